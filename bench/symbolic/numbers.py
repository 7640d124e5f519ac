"""Numbers of small tensors on a device that computes nothing: those that follow from what the host gave, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

LARGEST = 8192  # bytes of a storage whose numbers are kept


class Numbers:
    """By storage of a fake tensor, a storage of the host with its numbers."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.UntypedStorage] = {}

    def known(self, x: Tensor) -> Tensor | None:
        """The numbers, in the tensor's shape; None: they are unknown."""
        if not isinstance(x, FakeTensor):
            return x
        kept = self._kept.get(x.untyped_storage()._cdata)
        if kept is None:
            return None
        return torch.empty(0, dtype=x.dtype).set_(kept, x.storage_offset(), x.shape, x.stride())

    def keep(self, x: Tensor, numbers: Tensor) -> None:
        """These are the tensor's numbers now; those of the rest of its storage stay as they are."""
        key, size = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
        if not isinstance(x, FakeTensor) or size > LARGEST:
            return
        if key not in self._kept:
            if x.numel() * x.element_size() < size:
                return  # the rest is unknown
            self._kept[key] = torch.empty(size, dtype=torch.uint8).untyped_storage()
        known = self.known(x)
        assert known is not None
        known.copy_(numbers)

    def forget(self, key: int) -> None:
        self._kept.pop(key, None)

    def item(self, x: FakeTensor) -> Any:
        """The number; where it is unknown, one that neither stops nor skips anything."""
        known = self.known(x)
        if known is not None:
            return known.item()
        if x.dtype.is_floating_point:
            return 1.0
        return x.dtype == torch.bool or 1

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, written: Sequence[Tensor]
    ) -> None:
        """Compute what was done with known numbers; forget those that unknown ones were written over."""
        results = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        if func.is_view or not (results or written):
            return
        is_small = all(x.untyped_storage().nbytes() <= LARGEST for x in (*results, *written))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        values = [self.known(x) for x in inputs] if is_small else [None]
        if any(value is None for value in values) or func._overloadpacket.__name__.startswith(("empty", "new_empty")):
            for x in written:
                self.forget(x.untyped_storage()._cdata)
            return
        host = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
        plain_args, plain = tree_map_only(Tensor, self.known, (args, host))
        made = func(*plain_args, **plain)
        if written:
            return  # in place, on the host's storage
        for x, numbers in zip(results, (y for y in tree_leaves(made) if isinstance(y, Tensor)), strict=True):
            self.keep(x, numbers)
