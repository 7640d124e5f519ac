"""Process groups without peers: every message is told to the watch, and runs on a stream of the group's, as NCCL's do.

What comes from peers has shapes and no numbers, but for small tensors whose numbers are known here: peers are taken to have the same, or what
`others` says that they have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from bench.symbolic.mode import Symbolic, is_cuda

# Methods of ProcessGroup in all of torch's spellings: what they are called here, and which arguments are written and read.
METHODS: dict[str, tuple[str, int | None, int | None]] = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), ("all_reduce", 0, 0)),
    **dict.fromkeys(("allgather", "_allgather_base", "all_gather_single"), ("all_gather", 0, 1)),
    **dict.fromkeys(("allgather_coalesced", "allgather_into_tensor_coalesced", "all_gather_single_coalesced"), ("all_gather", 0, 1)),
    **dict.fromkeys(("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"), ("reduce_scatter", 0, 1)),
    **dict.fromkeys(("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"), ("reduce_scatter", 0, 1)),
    **dict.fromkeys(("alltoall_base", "all_to_all_single", "alltoall"), ("all_to_all", 0, 1)),
    "broadcast": ("broadcast", 0, 0),
    "reduce": ("reduce", 0, 0),
    "send": ("send", None, 0),
    "recv": ("recv", 0, None),
    "barrier": ("barrier", None, None),
}  # fmt: skip


UNKNOWN = ("gather", "scatter", "recv_anysource", "monitored_barrier")  # nothing here sends by them


def _refuse(name: str) -> Callable[..., Any]:
    def method(*unused: Any, **also_unused: Any) -> Any:
        raise NotImplementedError(f"ProcessGroup.{name} is not counted")

    return method


class Done(dist.Work):
    """A message under way: `wait` makes the current stream wait for it. It holds its tensors until then, as c10d does."""

    def __init__(self, finish: Callable[[], None], held: Sequence[Tensor]) -> None:
        super().__init__()
        self._finish, self._held = finish, held

    def wait(self, timeout: Any = None) -> bool:
        self._finish()
        self._held = ()
        return True

    def is_completed(self) -> bool:
        return False


class Groups:
    """Puts itself in the place of what ProcessGroup does, for the rest of this process.

    Attributes:
        others: what rank r of a group has where this rank has a tensor of known numbers; None: the same.
    """

    def __init__(self, mode: Symbolic, rank: int, world_size: int) -> None:
        self.mode = mode
        self.others: Callable[[int, Tensor], Tensor] | None = None
        self._batches: dict[dist.ProcessGroup, list[Tensor]] = {}
        for name, (kind, written, read) in METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._method(kind, written, read))
        pg: Any = dist.ProcessGroup
        for name in UNKNOWN:
            if hasattr(dist.ProcessGroup, name):
                setattr(pg, name, _refuse(name))
        pg._start_coalescing = lambda group, device: self._batches.update({group: []})
        pg._end_coalescing = lambda group, device: self._end(group)
        backend: Any = torch._C._distributed_c10d.Backend
        backend.supports_coalescing = property(lambda self: True)
        new_group = dist.new_group

        def grouped(
            ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **more: Any
        ) -> Any:
            return new_group(ranks, backend="fake", **more)

        c10d: Any = dist
        c10d.all_gather_object = self._objects
        c10d.new_group = c10d.distributed_c10d.new_group = grouped
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    @contextlib.contextmanager
    def peers(self, others: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Inside, rank r has `others(r, own)` where this one has `own`."""
        self.others = others
        try:
            yield
        finally:
            self.others = None

    def _objects(self, found: list[Any], own: Any, group: Any = None) -> None:
        """torch.distributed.all_gather_object; peers have the same."""
        self.mode.watch.now.messages["all_gather of objects"] += 1
        self.mode.watch.stopped("objects of peers")
        found[:] = [own] * len(found)

    def _method(self, kind: str, written: int | None, read: int | None) -> Callable[..., Any]:
        def method(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Done:
            values = (*args, *kwargs.values())
            outputs = tree_leaves(values[written]) if written is not None else []
            inputs = tree_leaves(values[read]) if read is not None else []
            for x in (*outputs, *inputs):
                if not is_cuda(x):
                    raise RuntimeError(f"{kind}: a tensor on {x.device}, which NCCL does not send")
                if not x.is_contiguous():
                    raise RuntimeError(
                        f"{kind}: a tensor of strides {x.stride()}, which NCCL takes for a contiguous one"
                    )
            self.mode.watch.now.messages[kind] += 1
            if kind == "barrier":
                self.mode.watch.stopped("a barrier")
            self._fill(kind, group, outputs, inputs, values)
            return self._issue(kind, group, outputs, inputs, values)

        return method

    def _issue(self, kind: str, group: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], values: Any) -> Done:
        order, current = self.mode.device.order, self.mode.device.current.name
        stream = f"messages of group {group.group_name}"
        if kind in ("send", "recv") and group not in self._batches:  # NCCL has a communicator for each pair of ranks
            peer = values[1] if len(values) > 1 else None
            stream += f" with rank {peer}"
        order.waits(stream, order.now(current))
        self.mode.use(kind, inputs, outputs, stream)
        held = [*outputs, *inputs]
        if group in self._batches:
            self._batches[group] += held
            return Done(lambda: None, ())
        return self._work(stream, held, values)

    def _work(self, stream: str, held: Sequence[Tensor], values: Any = ()) -> Done:
        order = self.mode.device.order
        mark = order.now(stream)
        work = Done(lambda: order.waits(self.mode.device.current.name, mark), held)
        if not all(getattr(option, "asyncOp", True) for option in values):
            work.wait()
        return work

    def _end(self, group: Any) -> Done:
        return self._work(f"messages of group {group.group_name}", self._batches.pop(group))

    def _fill(self, kind: str, group: Any, outputs: Sequence[Tensor], inputs: Sequence[Tensor], values: Any) -> None:
        """The numbers that come, where they are known."""
        numbers = self.mode.numbers
        known = [numbers.known(x) for x in inputs]
        if not outputs or kind == "broadcast":
            return
        if len(inputs) == 1 and known[0] is not None and kind in ("all_reduce", "all_gather"):
            ranks = dist.get_process_group_ranks(group)
            parts = [self.others(rank, known[0]) if self.others else known[0] for rank in ranks]
            if kind == "all_gather" and len(outputs) == 1:
                numbers.keep(outputs[0], torch.cat(parts).view(outputs[0].shape))
                return
            op = getattr(values[1], "reduceOp", None) if len(values) > 1 else None
            if kind == "all_reduce" and (op is None or op == dist.ReduceOp.SUM or op == dist.ReduceOp.MAX):
                stacked = torch.stack(parts)
                numbers.keep(
                    outputs[0], stacked.amax(0) if op is not None and op == dist.ReduceOp.MAX else stacked.sum(0)
                )
                return
        for x in outputs:
            numbers.forget(x.untyped_storage()._cdata)
