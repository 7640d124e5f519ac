"""What machines do: GPUs by their data sheets (`lsys.parallel.gpus`), or a machine by its calibration (`bench/predict.py`).

Data sheets say peaks; what code reaches of them is assumed, below, and not measured here: calibrate where you can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsys.config.messages import ConfigError, Mistake
from lsys.mixers.card import Card
from lsys.mixers.registry import CARDS
from lsys.parallel.gpus import Gpu, of_word
from lsys.parallel.links import NETWORK, NODE, Link, Links

# Parts of the peaks that are assumed. Products: large ones on tensor cores reach 60 to 75%. Attention: FlashAttention-2 35 to 50% on
# H100 (Dao, 2023), FlashAttention-3 up to 75% (Shah et al., 2024). Linear attention is bound by memory: published kernels reach 7 to
# 16% of that bound. In chunks of PyTorch operations 30% of the time is for intermediate results and the rest for launches, of which a layer
# of 32 heads of 128 has 1,700 forward and 3,900 backward for 8K tokens. Links: collectives reach 75 to 90%.
MATMUL, ATTENTION, KERNEL, CHUNKED, MEMORY_SHARE, LINK = 0.65, 0.5, 0.15, 0.3, 0.8, 0.8
LAUNCH = 10e-6  # s that a layer's kernels wait for their launch, each of some tens
USABLE = 0.92  # of a GPU's memory: the rest is the context's, NCCL's and lost between tensors


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Attributes:
        name: as asked for. ranks_per_node: of a node.
        gpu: whether ranks are GPUs; else processes on cores.
        memory: bytes of a rank; None: not known, or shared.
        peak: FLOP/s of a rank by precision, which MFU divides by; empty: unknown.
        costs: s for one of each quantity of `lsys.predict.work`.
        links: by link class. call: s that an operation takes its issuer.
        cores: of a node, where ranks are processes.
        overlap: share of a mixer's work behind which its messages can hide.
    """

    name: str
    ranks_per_node: int
    gpu: bool
    memory: float | None = None
    peak: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    links: Links = field(default_factory=dict)
    call: float = 0.0
    cores: int | None = None
    overlap: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether times can be told."""
        return bool(self.costs)

    def seconds(self, work: Mapping[str, float]) -> float:
        """Seconds that a rank needs for what it has to do."""
        return sum(amount * self.costs.get(name, 0.0) for name, amount in work.items())

    def require(self, cards: Iterable[Card]) -> None:
        """Refuse mixers without rates: their time would be taken for none.

        Raises:
            ConfigError: names them.
        """
        lacking = [card for card in cards if f"layer:{card.symbol}" not in self.costs]
        if lacking:
            problem = f"--hardware {self.name} has no rates for {', '.join(card.key for card in lacking)} layers"
            fix = "bench/predict.py makes a calibration that has them"
            if any(type(card) not in CARDS for card in lacking):  # a subclass of one of lsys's is the user's own
                fix = "for mixers of your own there are only those of data sheets: name a GPU, such as h100x8"
            raise ConfigError([Mistake("", problem, fix)])

    def to_json(self) -> dict[str, Any]:
        links = {name: [link.latency, link.bandwidth] for name, link in self.links.items()}
        return {**vars(self), "peak": dict(self.peak), "costs": dict(self.costs), "links": links}


def hardware(name: str, precision: str, default_ranks: int = 8, cards: Iterable[Card] = ()) -> Hardware:
    """The hardware of a name such as h100x8 (GPU, GPUs of a node), or of a calibration's path. Unknown GPUs are known by name only.

    Args:
        cards: of the model; data sheets have rates for mixers of the user's own too, those of their family.

    Raises:
        ConfigError: it is no such name, or the file is no calibration.
    """
    if name.endswith(".json"):
        return load(Path(name))
    found = re.fullmatch(r"([a-z]+[0-9]+[a-z]*)(?:x([1-9][0-9]*))?", name.lower())
    if not found:
        fix = "name a GPU and how many a node has, such as h100x8, or the JSON of a calibration"
        raise ConfigError([Mistake("", f"--hardware {name!r} is no hardware", fix)])
    gpu, ranks = of_word(found[1]), int(found[2] or default_ranks)
    if not gpu:
        return Hardware(name, ranks, True)
    families = {card.symbol: card.has_state for card in CARDS} | {card.symbol: card.has_state for card in cards}
    return _data_sheet(name, gpu, ranks, precision, families)


def _data_sheet(name: str, gpu: Gpu, ranks: int, precision: str, has_state: Mapping[str, bool]) -> Hardware:
    peaks, size, bandwidth = gpu.peaks, gpu.memory, gpu.bandwidth
    moved = 1 / (MEMORY_SHARE * bandwidth)  # s a byte
    matmul, attention = 1 / (MATMUL * peaks[precision]), 1 / (ATTENTION * peaks[precision])
    costs = {
        "matmul": matmul,
        "attention": attention,
        "attention_backward": attention,
        "bytes": 2 * moved,  # written, and read by what comes next
        "bytes_backward": 3 * moved,  # read, and gradients written and read
        "logits": 3 * moved,
        "logits_backward": 2 * moved,
        "optimizer": 28 * moved,  # gradient, two moments and the parameter: 16 bytes read, 12 and a bf16 copy written
        "gradients": 3 * moved,  # cleared, scaled, measured
        "micro_batch": LAUNCH,
        "step": 1e-3,
    }
    costs["weights_backward"] = 10 * moved  # the gradient, and its fp32 sum read and written
    fused = 1 / (KERNEL * bandwidth)
    chunked = {"": costs["bytes"] / CHUNKED, "_backward": costs["bytes_backward"] / CHUNKED}
    for kind in has_state:
        costs |= {f"layer:{kind}": 3 * LAUNCH, f"layer_backward:{kind}": 3 * LAUNCH}
        if has_state[kind]:  # backward reads and writes 4K + 3V elements of a token and head, forward 2K + 2V
            costs |= {f"fused:{kind}": fused, f"fused_backward:{kind}": 1.75 * fused}
            costs |= {f"{name}{way}:{kind}": s for name in ("kernel", "linked") for way, s in chunked.items()}
        else:
            costs |= {f"kernel:{kind}": costs["bytes"], f"kernel_backward:{kind}": costs["bytes_backward"]}
    links = {k: Link(link.latency, LINK * link.bandwidth) for k, link in gpu.links.items()}
    return Hardware(name, ranks, True, USABLE * size, peaks, costs, links, call=5e-6, overlap=1.0)


def load(path: Path) -> Hardware:
    """A calibration."""
    try:
        tree = json.loads(path.read_text())
        links = {name: Link(*values) for name, values in tree.pop("links").items()}
        if not {NODE, NETWORK} >= links.keys():
            raise KeyError("links")
        return Hardware(links=links, **{key: tree[key] for key in tree if key in Hardware.__dataclass_fields__})
    except OSError as error:
        raise ConfigError([Mistake("", f"--hardware {path}: {error.strerror}", "name a calibration's JSON")]) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        fix = "bench/predict.py writes one"
        raise ConfigError([Mistake("", f"--hardware {path} is no calibration", fix)]) from None
