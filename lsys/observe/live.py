"""Bytes of tensors: of those that are made and freed while something runs, and of those that an engine holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations of this thread make while it is entered; `peak` is the most that were alive together.

    Not what the process or an allocator holds. It slows small operations down several times.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        """before: tensors whose storages are not counted."""
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: dict[int, weakref.ref] = {}
        self._before = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._before or number in self._known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(number, None)

        self._known[number] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def held(engine: Any) -> list[Tensor]:
    """Parameters, buffers and gradients of an `lsys.train.engine.Engine`."""
    modules = [chunk.module for chunk in engine.chunks]
    parameters = [p for module in modules for p in module.parameters()]
    return [*parameters, *(b for module in modules for b in module.buffers()), *(p.main_grad for p in parameters)]


def engine_bytes(engine: Any) -> dict[str, int]:
    """Bytes of an engine's parameters, gradients and optimizer states, each storage once."""
    parameters = [p for chunk in engine.chunks for p in chunk.module.parameters()]
    states: list[Tensor] = []
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        states += [x for state in optimizer.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            states += [x for group in getattr(optimizer, name, []) for x in group]
    own = {p.untyped_storage().data_ptr() for p in parameters}
    states = [x for x in states if x.untyped_storage().data_ptr() not in own]
    return {
        "parameters": _total(parameters),
        "gradients": _total(p.main_grad for p in parameters),
        "optimizer": _total(states),
    }


def _total(tensors: Iterable[Tensor]) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
