"""Bytes that autograd keeps, as live tensors show them: of token mixers between their projections, by layer and moment; of channel mixers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KERNELS = ("lsys.model.mixers.softmax.softmax_attention", "lsys.model.mixers.state.linear_attention")


class Made(TorchDispatchMode):
    """Storages that operations make, by the layer that was under way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: int | None = None
        self._storages: dict[int, list[Any]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if self.layer is not None:
            given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            made = (x.untyped_storage() for x in tree_leaves(results) if isinstance(x, Tensor))
            self._storages[self.layer] += [ref(storage) for storage in made if id(storage) not in given]
        return results

    def alive(self, layer: int, but: Iterable[Tensor]) -> int:
        """Bytes, without the storages of some tensors."""
        held = {id(x): x for x in (found() for found in self._storages[layer]) if x is not None}
        others = {id(x.untyped_storage()) for x in but}
        return sum(x.nbytes() for key, x in held.items() if key not in others)


class MostMade(Made):
    """The most bytes, too, that were alive together after an operation, without the storages of some tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.most = 0, 0
        self.but: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.alive(0, self.but))
        return results


def channel_bytes(module: Any, tokens: int, hidden: int) -> tuple[int, int]:
    """What a channel mixer keeps of so many tokens, and the most that is alive in its backward pass.

    Its input, its output and the output's gradient do not count.
    """
    x = torch.randn(tokens, 1, hidden, dtype=next(module.parameters()).dtype, requires_grad=True)
    gradient = torch.ones_like(x)
    module.zero_grad(set_to_none=True)
    with MostMade() as made:
        output, _ = module(x)
        made.but = [output]
        kept = made.most = made.alive(0, made.but)
        output.backward(gradient)
    return kept, made.most


class Watch:
    """Notes, by layer: `forward`, bytes alive after its forward pass; `kernel`, when its kernel's backward pass begins, everything
    behind it being gone; `tables`, of those that layers share.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.made, self.current = engine, Made(), 0
        self.found: dict[int, dict[str, int]] = defaultdict(dict)
        self.packed: dict[int, Any] = {}

    def run(self, batches: Any) -> dict[int, dict[str, int]]:
        """A forward and backward pass."""
        with ExitStack() as stack:
            for name in KERNELS:
                module, _, attribute = name.rpartition(".")
                real = getattr(import_module(module), attribute)
                stack.enter_context(mock.patch(name, partial(self._kernel, real)))
            for layer in (layer for chunk in self.engine.chunks for layer in chunk.module.decoder.layers):
                mixer, number = layer.self_attention, layer.layer_number
                for handle in (
                    mixer.register_forward_pre_hook(partial(self._begin, number), with_kwargs=True),
                    mixer.out_proj.register_forward_pre_hook(self._leave),
                    layer.register_forward_hook(partial(self._end, number)),
                ):
                    stack.callback(handle.remove)
            with self.made:
                self.engine.forward_backward(batches)
        return dict(self.found)

    def _begin(self, number: int, module: Any, args: Any, kwargs: Any) -> None:
        self.made.layer = self.current = number
        self.packed[number] = kwargs["packed_seq_params"]

    def _leave(self, module: Any, args: Any) -> None:
        self.made.layer = None

    def _end(self, number: int, module: Any, args: Any, result: Any) -> None:
        tables = self._tables(number)
        self.found[number]["forward"] = self.made.alive(number, tables)
        self.found[number]["tables"] = sum(table.untyped_storage().nbytes() for table in tables)

    def _tables(self, number: int) -> list[Tensor]:
        return [table for pair in self.packed[number]._tables.values() for table in pair]

    def _kernel(self, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result, number = real(*args, **kwargs), self.current
        output = result[0] if isinstance(result, tuple) else result

        def begins(gradient: Tensor) -> None:
            self.found[number]["kernel"] = self.made.alive(number, self._tables(number))

        output.register_hook(begins)
        return result
