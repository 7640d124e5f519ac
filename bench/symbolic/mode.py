"""Operations on CUDA without CUDA: shapes by torch's fake tensors, numbers where they are few and known, and all told to the watch."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.symbolic.device import Device
from bench.symbolic.numbers import Numbers
from bench.symbolic.order import HOST, Access, Memory
from bench.symbolic.watch import Watch

ALLOCATION = 512  # bytes that torch's caching allocator rounds up to
# Not views by their schemas, and no kernels either.
FREE = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh", "is_same_size",
    "set_data", "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "_has_compatible_shallow_copy_type", "as_strided_", "alias",
    "_reshape_alias", "is_pinned",
}  # fmt: skip
# The host waits for how many there are.
SIZED = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
MASKS = (torch.bool, torch.uint8)


class Symbolic(TorchDispatchMode):
    """While it is on, tensors of CUDA have shapes and no numbers, but for small ones whose numbers follow from what the host gave.

    Tensors of the CPU are computed as ever. Backward passes have to run on this thread (`torch.autograd.set_multithreading_enabled`).
    """

    def __init__(self, device: Device, watch: Watch) -> None:
        super().__init__()
        self.device, self.watch, self.numbers = device, watch, Numbers()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.memories: dict[int, Memory] = {}
        self._addresses: dict[int, int] = {}
        self._next = 1 << 20

    # ---- one operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wanted = kwargs.get("device")
        to_cuda = wanted is not None and torch.device(wanted).type == "cuda"
        if not to_cuda and not any(isinstance(x, FakeTensor) for x in tensors):
            return self._on_host(func, args, kwargs, tensors)
        name = func._overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if to_cuda and torch.device(wanted).index is None:
            kwargs["device"] = torch.device("cuda", self.device.index)
        if name == "_local_scalar_dense":
            return self._item(args[0])
        if name in ("_to_copy", "copy_"):
            return self._copy(name, args, kwargs)
        self._look(name, func, args, kwargs, tensors)
        out = self._compute(name, func, args, kwargs)
        self._tell(name, func, tensors, written_by(func, args, kwargs), out)
        return out

    def _on_host(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
        pinned = kwargs.pop("pin_memory", False)
        written = written_by(func, args, kwargs)
        for x in tensors:
            memory = self.memories.get(storage(x))
            if memory is not None and not func.is_view:
                is_written = any(x is each for each in written)
                order = self.device.order
                order.access(memory, extent(x), Access(HOST, order.issue(HOST), f"{func}"), writes=is_written)
        out = func(*args, **kwargs)
        return self.pin(out) if pinned else out

    def _compute(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if name == "_fused_rms_norm":
            x, shape = args[0], args[1]
            rows = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
            with self.fake:
                return torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        plain = (args, kwargs)
        if any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in tree_leaves(plain)):
            plain = tree_map_only(Tensor, self._as_fake, plain)
        with self.fake:
            out = func(*plain[0], **plain[1])
        self.numbers.follow(func, args, kwargs, out, written_by(func, args, kwargs))
        return out

    def _as_fake(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            return x
        made = self.fake.from_tensor(x.detach(), static_shapes=True)
        made.constant = None
        return made

    # ---- what it means

    def _item(self, x: FakeTensor) -> Any:
        if x.fake_device.type == "cuda":
            self._stop("a number read on the host")
        return self.numbers.item(x)

    def _stop(self, what: str) -> None:
        self.watch.stopped(what)
        self._wait()

    def _look(
        self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> None:
        """What makes the host wait for how many there are."""
        if not any(is_cuda(x) for x in tensors):
            return
        by_mask = name.startswith(("index", "_index_put")) and any(
            isinstance(each, Tensor) and each.dtype in MASKS for each in tree_leaves(args[1])
        )
        is_fill = name.startswith(("index_put", "_index_put")) and args[2].numel() == 1
        counts = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in SIZED or counts or (by_mask and not is_fill):
            self._stop(f"{name}, whose size the host asks for")

    def _copy(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A copy between host and device; the result."""
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        is_up, is_down = target.type == "cuda" and not is_cuda(source), is_cuda(source) and target.type == "cpu"
        is_pinned = storage(source if is_up else args[0]) in self.memories and (is_up or name == "copy_")
        if source.numel() == 0:
            is_up = is_down = False
        if is_up:
            self.watch.copied(
                "pinned" if is_pinned and not waits else "pinned, waited for" if is_pinned else "pageable"
            )
        if is_down and (waits or not is_pinned):
            self.watch.stopped("a copy to the host")
        if (is_up or is_down) and not is_pinned:  # staged by the host once the stream has come to it
            self._wait()
        out = (
            args[0]
            if is_down and name == "copy_"
            else self._compute(name, getattr(torch.ops.aten, name).default, args, kwargs)
        )
        if is_down and is_pinned:
            self.use(name, [source], [args[0]])
        else:
            self._tell(name, getattr(torch.ops.aten, name).default, [source], [args[0]] if name == "copy_" else [], out)
        if (is_up or is_down) and waits:
            self._wait()
        return out

    def _wait(self) -> None:
        """The host waits for all that the current stream has to do."""
        self.device.order.waits(HOST, self.device.order.now(self.device.current.name))

    def _tell(self, name: str, func: Any, tensors: Sequence[Tensor], written: Sequence[Tensor], out: Any) -> None:
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and is_cuda(x)]
        for x in made:
            self.hold(x)
        if func.is_view or name in FREE:
            return
        results = [x for x in (*made, *written) if is_cuda(x)]
        if not results or not any(x.numel() for x in results):
            return
        self.watch.launched(name)
        self.use(name, [x for x in tensors if is_cuda(x) or storage(x) in self.memories], results)

    # ---- memory

    def use(self, what: str, read: Iterable[Tensor], written: Iterable[Tensor], stream: str | None = None) -> None:
        """A kernel, a copy or a message on a stream (None: the current one) that reads and writes these."""
        order = self.device.order
        actor = stream or self.device.current.name
        access = Access(actor, order.issue(actor), what)
        changed = {(storage(x), extent(x)) for x in written if x.numel()}
        seen = {(storage(x), extent(x)) for x in read if x.numel()} - changed
        for is_write, places in ((False, seen), (True, changed)):
            for key, place in places:
                if key in self.memories:
                    order.access(self.memories[key], place, access, writes=is_write)

    def hold(self, x: Tensor) -> None:
        """Note a new allocation on the device, until its storage is let go of."""
        kept = x.untyped_storage()
        key = kept._cdata
        if key in self.memories:
            return
        size = -(-kept.nbytes() // ALLOCATION) * ALLOCATION
        memory = self.memories[key] = Memory(self.device.current.name)
        self._addresses[key], self._next = self._next, self._next + max(size, ALLOCATION)
        self.watch.hold(size)

        def gone() -> None:
            del self.memories[key], self._addresses[key]
            self.numbers.forget(key)
            self.watch.hold(-size)
            self.device.order.free(memory, "what is made in its place")

        weakref.finalize(kept, gone).atexit = False

    def pin(self, x: Tensor) -> Tensor:
        """The same in pinned memory of the host."""
        made = x.clone()
        kept = made.untyped_storage()
        key = kept._cdata
        self.memories[key] = Memory(HOST)  # torch's allocator of pinned memory waits for copies by itself
        weakref.finalize(kept, self.memories.pop, key, None).atexit = False
        return made

    def is_pinned(self, x: Tensor) -> bool:
        return storage(x) in self.memories and not is_cuda(x)

    def address(self, x: Tensor) -> int:
        """Where the tensor would be; none shares its place with another."""
        return self._addresses.get(storage(x), 0) + int(x.storage_offset()) * x.element_size()

    def recorded(self, x: Tensor, stream: Any) -> None:
        """torch.Tensor.record_stream"""
        self.memories[storage(x)].recorded.add(stream.name)


def is_cuda(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def extent(x: Tensor) -> tuple[int, int]:
    """The bytes of its storage from a tensor's first to its last."""
    begin = int(x.storage_offset())
    end = begin + 1 + sum((int(size) - 1) * int(stride) for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin * x.element_size(), end * x.element_size()


def written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation changes."""
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found
