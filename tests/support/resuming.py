"""A tiny run that loads a checkpoint, trains, saves: what the tests of checkpoints look at."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support import parity


@dataclass
class Seen:
    """What one rank saw: losses and norms of the steps that it ran, its pieces of parameters and Adam's step counts at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]] = field(default_factory=list)


@contextlib.contextmanager
def engine_of(rank: int, world_size: int, changes: dict[str, Any]) -> Iterator[Any]:
    """An engine on this rank."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = parity.settings(**changes)
    with process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        yield Engine(config, groups)


def cursor_of(engine: Any, step: int) -> Any:
    from lsys.checkpoint import Cursor
    from lsys.config.load import dump

    return Cursor(step, step * engine.settings.train.batch_tokens, dump(engine.settings), {"note": "kept"})


def advance(engine: Any, start: int, stop: int, seen: Seen) -> None:
    """Run steps start..stop-1."""
    from lsys.data.plan import Planner

    config, groups = engine.settings, engine.groups
    parallel, train = config.parallel, config.train
    documents: Any = parity.RandomDocuments(config.model.vocab)
    planner = Planner(
        documents, train.batch_tokens, train.micro_batch_tokens, parallel.context, parallel.tensor, parallel.layout
    )
    for step in range(start, stop):
        plan = planner.step(step, groups.data_rank, groups.data_size)
        losses = engine.forward_backward(plan.on_rank(groups.context_rank, groups.device, groups.context))
        seen.rates.append(engine.learning_rate)
        seen.norms.append(engine.step().norm)
        seen.losses.append(losses.mean)


def look(engine: Any, seen: Seen) -> Seen:
    from lsys.model.parameters import pieces

    with engine.settled_parameters():
        seen.pieces = [
            (p.key, p.shape, p.offset, p.data.clone()) for chunk in engine.chunks for p in pieces(chunk.module)
        ]
    seen.counts = [
        float(s["step"]) for o in engine.optimizer.chained_optimizers for s in o.optimizer.state.values() if "step" in s
    ]
    return seen


def run(
    rank: int,
    world_size: int,
    changes: dict[str, Any],
    folder: Path,
    *,
    stop: int,
    load: str | None = None,
    save: tuple[int, ...] = (),
) -> Seen:
    """Train up to step `stop`, from the named checkpoint of `folder` if there is a name, saving after the steps in `save`."""
    from lsys.checkpoint import Checkpoints

    seen, step = Seen(), 0
    checkpoints = Checkpoints(folder, keep=2)
    with engine_of(rank, world_size, changes) as engine:
        if load:
            cursor = checkpoints.load(engine, folder / load)
            assert cursor == cursor_of(engine, cursor.step) or changes
            step = cursor.step
        for until in (*save, stop):
            advance(engine, step, until, seen)
            step = until
            if until in save:
                with engine.settled_parameters():
                    checkpoints.save(engine, cursor_of(engine, until))
        return look(engine, seen)
