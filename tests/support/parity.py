"""Runs a tiny hybrid model under any degrees and gives what must not depend on them: gradients, norms, losses."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from support.comparing import largest

# Lengths that no degree divides: bytes to a document longer than a micro-batch, ones, a two.
LENGTHS = (1, 41, 7, 130, 3, 1, 59, 2, 211, 13, 1, 28, 5, 77, 19)
STEPS = 5


def settings(**changes: Any) -> Any:
    """A configuration; `changes` are dotted keys with __ for the dot."""
    from lsys.config import Config
    from lsys.config.user_code import UserCode

    tree: dict[str, dict[str, Any]] = {
        "model": dict(
            pattern="LLLS",
            layers=4,
            hidden=32,
            heads=4,
            groups=2,
            head_dim=8,
            ffn=48,
            vocab=61,
            vocab_multiple=8,
            norm_eps=1e-3,  # else the norm of an output near 0 makes a hundredfold of rounding, step by step
        ),
        "parallel": {},
        "data": {"corpora": [{"path": "unused"}]},
        "optimizer": dict(lr=0.01, warmup_steps=1, clip=0.1),
        "train": dict(
            folder="unused", steps=STEPS, batch_tokens=4 * 97, micro_batch_tokens=97, precision="fp32", z_loss=1e-3
        ),
    }
    for key, value in changes.items():
        section, name = key.split("__", 1)
        tree[section][name] = value
    return Config.model_validate(tree, context=UserCode(None))


class RandomDocuments:
    """An endless stream of random tokens over LENGTHS; stands in for lsys.data.stream.TokenStream."""

    def __init__(self, vocab: int) -> None:
        rng = np.random.default_rng(0)
        total = sum(LENGTHS)
        repeats = 1 + STEPS * 4 * 97 // total
        self.lengths = np.array(LENGTHS * repeats)
        self.ends = self.lengths.cumsum()
        self.tokens = rng.integers(0, vocab, self.ends[-1])

    def batch(self, start: int, count: int) -> Any:
        stop = start + count
        inside = np.clip(self.ends, start, stop) - np.clip(self.ends - self.lengths, start, stop)
        targets = np.zeros(count, dtype=np.int64)
        mask = np.ones(count, dtype=np.float32)
        places = np.arange(start, stop)
        last = np.isin(places + 1, self.ends)
        targets[~last] = self.tokens[places[~last] + 1]
        mask[last] = 0
        return SimpleNamespace(
            lengths=inside[inside > 0], tokens=self.tokens[start:stop].copy(), targets=targets, loss_mask=mask
        )


@dataclass
class Outcome:
    """What one rank saw: its pieces of the first step's gradients, and the same numbers on all ranks."""

    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def train(
    rank: int, world_size: int, changes: dict[str, Any], fault: str | None = None, ranks_per_node: int = 8
) -> Outcome:
    """Five steps; runs on every rank of a gloo group. Nodes matter to the methods that send less across them."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.model.parameters import pieces
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = settings(**changes)
    parallel, outcome = config.parallel, Outcome()
    with process_groups(parallel, Launch(rank=rank, world_size=world_size, node=rank // ranks_per_node)) as groups:
        from support import faults

        with faults.planted(fault):
            engine = Engine(config, groups)
            faults.after_build(fault, engine)
            planner = Planner(
                RandomDocuments(config.model.vocab),  # type: ignore[arg-type]  # stands in for the stream
                config.train.batch_tokens,
                config.train.micro_batch_tokens,
                parallel.context,
                parallel.tensor,
                parallel.layout,
            )
            for step in range(STEPS):
                plan = planner.step(step, groups.data_rank, groups.data_size)
                batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
                losses = engine.forward_backward(batches, force_all_reduce=step == 0)
                if step == 0:
                    outcome.pieces = [
                        (p.key, p.shape, p.offset, p.data.clone())
                        for chunk in engine.chunks
                        for p in pieces(chunk.module, gradients=True)
                    ]
                outcome.norms.append(engine.step().norm)
                outcome.losses.append(losses.mean)
    return outcome


def merge(outcomes: list[Outcome]) -> tuple[dict[str, torch.Tensor], float]:
    """Whole gradients by global name, and how much ranks that hold the same piece disagree (relative). Every element must be held."""
    whole: dict[str, torch.Tensor] = {}
    held: dict[str, torch.Tensor] = {}
    disagreement = 0.0
    for outcome in outcomes:
        for key, shape, offset, data in outcome.pieces:
            target = whole.setdefault(key, torch.zeros(shape))
            seen = held.setdefault(key, torch.zeros(shape, dtype=torch.bool))
            place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
            if seen[place].any():
                disagreement = largest((disagreement, float((target[place] - data).norm() / data.norm())))
            target[place], seen[place] = data, True
    assert all(seen.all() for seen in held.values()), [key for key, seen in held.items() if not seen.all()]
    return whole, disagreement


def difference(one: list[Outcome], many: list[Outcome]) -> dict[str, float]:
    """Largest relative difference of gradients (per parameter), of the gradient norms, of the losses."""
    (reference, _), (merged, disagreement) = merge(one), merge(many)
    assert reference.keys() == merged.keys(), reference.keys() ^ merged.keys()
    gradients = largest(float((merged[k] - g).norm() / g.norm()) for k, g in reference.items())

    def relative(a: list[float], b: list[float]) -> float:
        return largest(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))

    return {
        "gradients": gradients,
        "replicas": disagreement,
        "first norm": relative(one[0].norms[:1], many[0].norms[:1]),
        "losses": largest(relative(one[0].losses, outcome.losses) for outcome in many),
    }
