"""Bytes of an `lsys.train.engine.Engine`: what it holds, and the most that a forward and backward pass makes."""

import gc
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker


def peak_bytes(engine: Any, batches: Sequence[Any]) -> int:
    """Most bytes of tensors that operations of a forward and backward pass make and that are alive together.

    Parameters, buffers and gradients, which were there before, do not count.
    """
    gc.collect()
    tracker = MemTracker()
    # Without its hooks of modules, which refuse a second micro-batch, and Megatron's DDP: `buffers` is a list there.
    tracker._mod_tracker = mock.MagicMock()
    for chunk in engine.chunks:
        tracker.track_external(chunk.module, *(p.main_grad for p in chunk.module.parameters()))
    before = _tracked(tracker, "current")
    with tracker:
        engine.forward_backward(batches)
    return _tracked(tracker, "peak") - before


def _tracked(tracker: MemTracker, when: str) -> int:
    return sum(device["Total"] for device in tracker.get_tracker_snapshot(when).values())


def _parameters(engine: Any) -> list[Tensor]:
    return [parameter for chunk in engine.chunks for parameter in chunk.module.parameters()]


def engine_bytes(engine: Any) -> dict[str, int]:
    """Bytes of an engine's parameters, gradients and optimizer states, each storage once."""
    parameters = _parameters(engine)
    states: list[Tensor] = []
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        states += [x for state in optimizer.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            states += [x for group in getattr(optimizer, name, []) for x in group]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    states = [x for x in states if x.untyped_storage().data_ptr() not in own]
    return {
        "parameters": _total(parameters),
        "gradients": _total(p.main_grad for p in parameters),  # type: ignore[attr-defined]  # Megatron's
        "optimizer": _total(states),
    }


def _total(tensors: Iterable[Tensor]) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
