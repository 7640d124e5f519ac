"""Faults that distributed training systems have had, planted on purpose: the parity test must notice each."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Fault:
    """Where it shows, and how it is planted: around the run, or in the built engine."""

    ranks: int
    changes: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], Any] = contextlib.nullcontext
    after_build: Callable[[Any], None] = lambda engine: None


def _documents_run_together() -> Any:
    """No reset at document boundaries: the pack is laid out as one document."""
    from lsys.parallel.layout import SequenceLayout

    original = SequenceLayout.zigzag.__func__  # type: ignore[attr-defined]
    return mock.patch.object(
        SequenceLayout, "zigzag", classmethod(lambda cls, lengths, ranks: original(cls, (sum(lengths),), ranks))
    )


@contextlib.contextmanager
def _rank_order_prefix() -> Iterator[None]:
    """States of a document composed in the order of the ranks that hold them, instead of by position: wrong for zigzag."""
    links = importlib.import_module("lsys.parallel.linear.state_exchange_plan")
    in_rank_order = lambda layout: layout.table().take(layout.table().document.argsort(stable=True))  # noqa: E731
    with mock.patch.object(links, "position_order", in_rank_order):
        yield


def _mean_of_ranks() -> Any:
    """Each micro-batch's mean instead of its sum: ranks with few tokens weigh too much."""
    import lsys.train.engine as engine

    original = engine._forward_step

    def forward_step(batches: Any, chunk: Any) -> Any:
        output: Any
        loss: Any  # what gives the sum, its tokens and what is reported
        output, loss = original(batches, chunk)

        def mean(losses: Any) -> Any:
            total, tokens, report = loss(losses)
            return total / tokens.clamp(min=1), (tokens > 0).int(), report

        return output, mean

    return mock.patch.object(engine, "_forward_step", forward_step)


def _unmark_norms(engine: Any) -> None:
    """Norm weights without the sequence-parallel mark: their gradients stay those of this rank's tokens."""
    for chunk in engine.chunks:
        for parameter in chunk.module.parameters():
            parameter.sequence_parallel = False


def _batched_transfers(engine: Any) -> None:
    """Megatron's default point-to-point transfers, wrong with two stages of two virtual chunks."""
    engine.config.batch_p2p_comm = True


def _rotary_from_rank_start() -> Any:
    """Rotary positions counted from the start of each rank's tokens instead of each token's own position in its document."""
    import torch

    from lsys.model.packed import PackedMicroBatch

    original = PackedMicroBatch.rotary

    def rotary(self: Any, base: float, dim: int) -> Any:
        positions = torch.arange(len(self.positions))
        return original(PackedMicroBatch(layout=self.layout, positions=positions), base, dim)

    return mock.patch.object(PackedMicroBatch, "rotary", rotary)


FAULTS = {
    "prefix in rank order": Fault(2, {"parallel__context": 2}, around=_rank_order_prefix),
    "missing document reset": Fault(2, {"parallel__context": 2}, around=_documents_run_together),
    "mean for sum": Fault(2, {"parallel__context": 2}, around=_mean_of_ranks),
    "missing sequence-parallel reduction": Fault(2, {"parallel__tensor": 2}, after_build=_unmark_norms),
    "batched transfers": Fault(
        2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}, after_build=_batched_transfers
    ),
    "positions by rank": Fault(
        2, {"parallel__context": 2, "parallel__layout": "contiguous"}, around=_rotary_from_rank_start
    ),
}


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    with FAULTS[fault].around() if fault else contextlib.nullcontext():
        yield


def after_build(fault: str | None, engine: Any) -> None:
    if fault:
        FAULTS[fault].after_build(engine)
