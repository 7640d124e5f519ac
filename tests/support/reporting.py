"""Layers that report values which are known by hand, on engines of any degrees; and faults that such reporting could have."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from support import parity

ALL = ("tensor", "context", "data")
IN_WIDTH = 4 * 4 * 8  # q, k, v and the gate of an `L` layer of support.parity
MICRO_TOKENS, MICRO_BATCHES = 97, 4


def metrics(config: Any) -> Iterable[Any]:
    from lsys.config.reports import Metric

    yield Metric("probe/tokens", "sum", console="probed")
    yield Metric("probe/position", "mean")
    yield Metric("probe/square", "mean", weight="probe/tokens")
    yield Metric("probe/longest", "max")
    yield Metric("probe/residues", "sum", size=3)
    yield Metric("probe/ends", "max", size=2)
    yield Metric("probe/width", "sum", axes=("tensor",))
    yield Metric("probe/highest", "max", axes=ALL)
    yield Metric("probe/never", "mean")


def report(mixer: Any, projected: torch.Tensor, packed: Any) -> None:
    """What layers 2 and 3 of four report; they are in the middle of any pipeline."""
    positions, layer = packed.positions, mixer.layer_number
    if layer not in (2, 3):
        return
    packed.report("probe/position", positions.sum(), len(positions))
    packed.report("probe/highest", 10.0 * layer + mixer.tp_group.rank())
    if layer == 2:
        packed.report("probe/tokens", len(positions))
        packed.report("probe/square", (positions**2).sum())
        packed.report("probe/width", projected.shape[-1])
    else:
        packed.report("probe/residues", torch.bincount(positions % 3, minlength=3))
        if len(positions):
            packed.report("probe/longest", positions.max() + 1)
            packed.report("probe/ends", torch.stack((positions.max(), -positions.min())))


def expected(steps: Iterable[int], tensor: int, replicas: int) -> dict[str, float]:
    """The same, from the lengths of the documents alone."""
    documents = parity.RandomDocuments(61)
    steps, tokens = list(steps), MICRO_TOKENS * MICRO_BATCHES
    positions = np.concatenate(
        [
            np.arange(length)
            for step in steps
            for start in range(step * tokens, (step + 1) * tokens, MICRO_TOKENS)
            for length in documents.batch(start, MICRO_TOKENS).lengths
        ]
    )
    assert len(positions) == tokens * len(steps)
    residues = {f"probe/residues/{place}": (positions % 3 == place).sum() / len(steps) for place in range(3)}
    return residues | {
        "probe/tokens": tokens,
        "probe/position": positions.mean(),
        "probe/square": (positions.astype(float) ** 2).mean(),
        "probe/longest": positions.max() + 1,
        "probe/ends/0": positions.max(),
        "probe/ends/1": 0,
        "probe/width": IN_WIDTH * MICRO_BATCHES // replicas,
        "probe/highest": 30 + tensor - 1,
    }


@contextlib.contextmanager
def reporting(fault: str = "") -> Iterator[None]:
    """Inside, `L` layers report; with a fault of FAULTS."""
    from lsys.config import reports
    from lsys.model.mixers.lightning import LightningMixer

    original = LightningMixer.mix

    def mix(self: Any, projected: torch.Tensor, packed: Any, *more: torch.Tensor) -> torch.Tensor:
        report(self, projected, packed)
        return original(self, projected, packed, *more)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(reports, "SOURCES", [*reports.SOURCES, metrics]))
        stack.enter_context(mock.patch.object(LightningMixer, "mix", mix))
        if fault:
            stack.enter_context(FAULTS[fault]())
        yield


def _messages(**changes: Any) -> Any:
    from lsys.config.reports import Slots

    original = Slots._messages
    changed = lambda self, *args: [replace(message, **changes) for message in original(self, *args)]  # noqa: E731
    return mock.patch.object(Slots, "_messages", changed)


def _passes_go_on() -> Any:
    from lsys.observe.values import Pass

    return mock.patch.object(Pass, "end", lambda self: None)


def _copies_count() -> Any:
    from lsys.observe.values import Collector

    return mock.patch.object(Collector, "_copies", lambda *_: ())


FAULTS = {
    "what is recomputed counts twice": _passes_go_on,
    "other stages are forgotten": lambda: _messages(last_stage=True),
    "other tensor ranks are forgotten": lambda: _messages(over_tensor=False),
    "copies count": _copies_count,
}


def curves(rank: int, world_size: int, changes: dict[str, Any], fault: str = "") -> list[dict[str, float]]:
    """What two steps report, then a validation without gradients in the next step's batch, then that step."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = parity.settings(**changes)
    parallel = config.parallel
    stream: Any = parity.RandomDocuments(config.model.vocab)
    with process_groups(parallel, Launch(rank=rank, world_size=world_size)) as groups, reporting(fault):
        engine = Engine(config, groups)
        planner: Any = Planner(
            stream,
            MICRO_TOKENS * MICRO_BATCHES,
            MICRO_TOKENS,
            parallel.context,
            parallel.tensor,
            parallel.layout,  # type: ignore[arg-type]
        )

        def values(step: int, forward_only: bool = False) -> Any:
            plan = planner.step(step, groups.data_rank, groups.data_size)
            batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
            return engine.forward_backward(batches, forward_only=forward_only).values

        first = values(0).followed_by(values(1))
        return [each.curves for each in (first, values(2, forward_only=True), values(2))]


def run(rank: int, world_size: int, folder: str, changes: dict[str, Any], every: int) -> str:
    """What a whole run prints whose layers report, with a point every so many steps in the folder's TensorBoard."""
    import io
    from contextlib import redirect_stdout
    from pathlib import Path

    from lsys.config.schema import Checkpoint, Metrics
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.run import Run
    from support.delays import StubData

    class Data(StubData):
        """With one validation step, of the batch of step 4."""

        validation_steps = 1

        def validation(self) -> Iterator[Any]:
            yield self.training(4)[0]

    config = parity.settings(**changes, train__steps=4, train__validate_every=2, train__folder=Path(folder))
    metrics, checkpoint = Metrics(every=every, waterfall_every=0), Checkpoint(save=False)
    config = config.model_copy(update={"metrics": metrics, "checkpoint": checkpoint})
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("lsys.train.data.open_data", Data))
        stack.enter_context(mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None))
        groups = stack.enter_context(process_groups(config.parallel, Launch(rank=rank, world_size=world_size)))
        stack.enter_context(reporting())
        stack.enter_context(redirect_stdout(said))
        Run(config, groups).train()
    return said.getvalue()
