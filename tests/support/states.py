"""Layers with states that are no parameters, known by hand, on which the loss depends; runs that save, load and go on."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from support import parity, resuming

HEADS = 4
COUNTS = "probe/places"


def metrics(config: Any) -> Iterable[Any]:
    from lsys.config.reports import Metric

    yield Metric(COUNTS, "sum", size=3)


@contextlib.contextmanager
def stateful(told: list[tuple[str, int, int]] | None = None) -> Iterator[None]:
    """Inside, `L` layers count tokens by the place in their document, over all ranks, and keep a number for each head; both change their output.
    Beside what is cut over the heads stands what is whole: a scalar, a vector and a module with a parameter.

    Args:
        told: takes what the layers are told: "begin" or "end", layer, step.
    """
    from lsys.config import reports
    from lsys.model.mixers.heads import HeadParameters
    from lsys.model.mixers.lightning import LightningMixer
    from lsys.model.mixers.mixer import SharedLinear

    build, mixing, told = LightningMixer.__init__, LightningMixer.mix, [] if told is None else told

    def init(self: Any, config: Any, *args: Any, **named: Any) -> None:
        build(self, config, *args, **named)
        self.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
        self.of_heads = HeadParameters(config, self.tp_group)
        self.of_heads.add_state("scale", (HEADS,), 0.25, torch.float64)
        self.of_heads.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.of_heads.register_buffer("trace", torch.zeros(HEADS - 1))
        self.of_heads.inner = SharedLinear(config, 1, 1)

    def mix(self: Any, projected: torch.Tensor, packed: Any, *more: torch.Tensor) -> torch.Tensor:
        if self.layer_number == 2:
            packed.report(COUNTS, torch.bincount(packed.positions % 3, minlength=3))
        factor = self.of_heads.scale.float().repeat_interleave(8) * (1 + self.counts[1] % 7)
        factor = factor * (1 + self.of_heads.steps + self.of_heads.trace.sum() + self.of_heads.inner.weight[0, 0])
        return mixing(self, projected, packed, *more) * factor

    def begin_step(self: Any, step: int) -> None:
        told.append(("begin", self.layer_number, step))

    def end_step(self: Any, step: int, values: Any) -> None:
        told.append(("end", self.layer_number, step))
        self.counts += torch.tensor(values.of(COUNTS)).long()
        scale, local = self.of_heads.scale, HEADS // self.tp_group.size()
        heads = torch.arange(local) + self.tp_group.rank() * local
        scale.mul_(0.9).add_((heads + self.layer_number).double() / (3 * step))
        self.of_heads.steps += 1
        self.of_heads.trace.mul_(0.5).add_(torch.arange(HEADS - 1) * step)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(reports, "SOURCES", [*reports.SOURCES, metrics]))
        for name, method in (("__init__", init), ("mix", mix)):
            stack.enter_context(mock.patch.object(LightningMixer, name, method))
        stack.enter_context(mock.patch.object(LightningMixer, "begin_step", begin_step, create=True))
        stack.enter_context(mock.patch.object(LightningMixer, "end_step", end_step, create=True))
        yield


def known(steps: int) -> dict[tuple[int, str], torch.Tensor]:
    """The states after so many steps, from the documents alone."""
    documents, tokens = parity.RandomDocuments(61), 97
    lengths = [n for part in range(4 * steps) for n in documents.batch(part * tokens, tokens).lengths]
    places = np.concatenate([np.arange(length) % 3 for length in lengths])
    counts = torch.from_numpy(np.bincount(places, minlength=3))
    found: dict[tuple[int, str], torch.Tensor] = {}
    for layer in (1, 2, 3):
        scale, trace = torch.full((HEADS,), 0.25, dtype=torch.float64), torch.zeros(HEADS - 1)
        for step in range(1, steps + 1):
            scale.mul_(0.9).add_((torch.arange(HEADS) + layer).double() / (3 * step))
            trace.mul_(0.5).add_(torch.arange(HEADS - 1) * step)
        found |= {(layer, "counts"): counts, (layer, "scale"): scale}
        found |= {(layer, "steps"): torch.tensor([steps]), (layer, "trace"): trace}
    return found


def run(
    rank: int,
    world_size: int,
    changes: dict[str, Any],
    folder: Path,
    *,
    stop: int,
    load: int = 0,
    save: int = 0,
    has_state: bool = True,
) -> dict[str, Any]:
    """Losses, norms, what was told, and this rank's states at the end by (layer, name, first head)."""
    from lsys.checkpoint import Checkpoints

    told: list[tuple[str, int, int]] = []
    seen, checkpoints, step = resuming.Seen(), Checkpoints(folder, keep=2), load
    with contextlib.ExitStack() as stack:
        if has_state:
            from lsys.runtime import install_megatron

            install_megatron()
            stack.enter_context(stateful(told))
        engine = stack.enter_context(resuming.engine_of(rank, world_size, changes))
        if load:
            checkpoints.load(engine, folder / f"step-{load:08d}")
        for until in filter(None, (save, stop)):
            resuming.advance(engine, step, until, seen)
            step = until
            if until == save:
                with engine.settled_parameters():
                    checkpoints.save(engine, resuming.cursor_of(engine, until))
        states: dict[tuple[int, str, int], torch.Tensor] = {}
        for layer in (layer for chunk in engine.chunks for layer in chunk.module.decoder.layers):
            mixer = layer.self_attention
            if has_state and hasattr(mixer, "of_heads"):
                first = mixer.tp_group.rank() * HEADS // mixer.tp_group.size()
                states[mixer.layer_number, "counts", 0] = mixer.counts.clone()
                states[mixer.layer_number, "steps", 0] = mixer.of_heads.steps.clone().reshape(1)
                states[mixer.layer_number, "trace", 0] = mixer.of_heads.trace.clone()
                states[mixer.layer_number, "scale", first] = mixer.of_heads.scale.clone()
        return {"losses": seen.losses, "norms": seen.norms, "told": told, "states": states}
