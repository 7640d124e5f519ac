"""One rank of many, alone in its process: what it receives is zero, and what it does is recorded."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lsys.parallel.comm import Pending, SequenceComm, _padded, _without_padding, is_uneven
from lsys.parallel.ledger import Operation
from lsys.parallel.replay.program import Compute, Issue, Program, Step, Wait

Result = TypeVar("Result")


class SoloComm(SequenceComm):
    """Stands in for the `SequenceComm` of one rank where the other ranks, and process groups, do not exist.

    Every receive gives zeros at once, so that a method's real code runs, forward and backward, and leaves its program:
    computation is the CPU time of the thread between the operations. It wants tensors on the CPU.

    Args:
        rank, size: this rank, and how many there would be.
        node_of_rank: node of each rank; None says that all share one.
        axis: as of a SequenceComm.
        backend: whose operations the program has: on "gloo" ranks sum what they exchange where NCCL reduce-scatters.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        node_of_rank: Sequence[int] | None = None,
        axis: str = "context",
        backend: str = "nccl",
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not among the {size} ranks 0..{size - 1}")
        self.group: Any = None
        self.axis, self.backend = axis, backend
        self.rank, self.size, self.ranks = rank, size, tuple(range(size))
        self.node_of_rank = (0,) * size if node_of_rank is None else tuple(node_of_rank)
        if len(self.node_of_rank) != size:
            raise ValueError(f"node_of_rank names {len(self.node_of_rank)} ranks; the {axis} group has {size}")
        self.restart()

    def restart(self) -> None:
        """Forget what was recorded: after a first run, which sets things up."""
        self._steps: list[Step] = []
        self._count = 0
        self._left = {threading.get_ident(): time.thread_time()}  # CPU time of each thread when it left an operation

    @property
    def program(self) -> Program:
        """What was done since the start, up to now."""
        rest = Compute(self._computed())
        return Program(self.rank, self.node_of_rank[self.rank], (*self._steps, rest))

    def all_gather_async(
        self, x: Tensor, sizes: Sequence[int] | None = None, *, exact: bool = False
    ) -> Pending[Tensor]:
        sizes = self._sizes(sizes, x.shape[0])
        slot = max(sizes)
        if self.size == 1 or math.prod((slot, *x.shape[1:])) == 0 or (exact and is_uneven(sizes)):
            return super().all_gather_async(x, sizes, exact=exact)  # sends nothing, or by `exchange`
        padded = _padded(x.detach(), slot)  # [slot, ...]
        shape = (self.size * slot, *x.shape[1:])
        return self._issue(
            [Operation("all_gather", padded.nbytes)],
            lambda: padded.new_zeros(shape),
            lambda out: _without_padding(out, sizes, slot),
        )

    def reduce_scatter_async(self, x: Tensor, sizes: Sequence[int] | None = None) -> Pending[Tensor]:
        each = self._sizes(sizes, x.shape[0] // self.size)
        if x.numel() == 0 and self.backend != "gloo":
            return Pending(lambda: x)
        if self.size == 1 or self.backend == "gloo" or is_uneven(each):
            return super().reduce_scatter_async(x, sizes)  # sends nothing, or by `all_to_all_async`
        slot, own = max(each), each[self.rank]
        padded = x.detach().contiguous()
        if min(each) < slot:
            padded = torch.cat([_padded(part, slot) for part in padded.split(list(each))])  # [ranks * slot, ...]
        shape = (slot, *x.shape[1:])
        return self._issue(
            [Operation("reduce_scatter", padded.nbytes)], lambda: padded.new_zeros(shape), lambda out: out[:own]
        )

    def all_to_all_async(
        self, x: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Pending[Tensor]:
        send = self._sizes(send, x.shape[0] // self.size)
        receive = self._sizes(receive, x.shape[0] // self.size)
        if x.shape[0] != sum(send):
            raise ValueError(f"all_to_all takes {sum(send)} rows, the sum of send; got {x.shape[0]}")
        if self.size == 1:
            return Pending(lambda: x)
        source, row = x.detach().contiguous(), math.prod(x.shape[1:]) * x.element_size()
        parts = Operation(
            "all_to_all", send=tuple(rows * row for rows in send), receive=tuple(rows * row for rows in receive)
        )
        return self._issue([parts], lambda: source.new_zeros(sum(receive), *x.shape[1:]), lambda out: out)

    def exchange(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Pending[Mapping[int, Tensor]]:
        operations = [
            Operation(kind, tensors[peer].nbytes, peer)
            for kind, tensors in (("recv", receive), ("send", send))
            for peer in sorted(tensors)
            if tensors[peer].numel()
        ]

        def zeros() -> Mapping[int, Tensor]:
            for buffer in receive.values():
                buffer.zero_()
            return receive

        return self._issue(operations, zeros, lambda out: out)

    def _issue(
        self, operations: Sequence[Operation], zeros: Callable[[], Result], finish: Callable[[Result], Any]
    ) -> Pending[Any]:
        """Record the operations; `zeros` makes what they bring, `finish` what is made of it after the wait."""
        self._steps.append(Compute(self._computed()))
        keys = range(self._count, self._count + len(operations))
        self._count += len(operations)
        self._steps += [Issue(key, op, self.ranks, self.axis) for key, op in zip(keys, operations, strict=True)]
        out = zeros()
        self._leave()
        return Pending(lambda: finish(out), cast(Any, _Wait(self, keys)))

    def _wait(self, keys: Sequence[int]) -> None:
        self._steps.append(Compute(self._computed()))
        self._steps += map(Wait, keys)
        self._leave()

    def _computed(self) -> float:
        now = time.thread_time()
        return now - self._left.get(threading.get_ident(), now)

    def _leave(self) -> None:
        self._left[threading.get_ident()] = time.thread_time()


class _Wait:
    """In the place of a Work."""

    def __init__(self, comm: SoloComm, keys: Sequence[int]) -> None:
        self._comm, self._keys = comm, keys

    def wait(self) -> None:
        self._comm._wait(self._keys)
