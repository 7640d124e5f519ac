"""The collectives of one axis, on tensors whose first sizes differ from rank to rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lsys.parallel.ledger import label
from lsys.parallel.messages.placement import is_uneven

Result = TypeVar("Result")
Other = TypeVar("Other")


class Pending(Generic[Result]):
    """A result under way: `wait()` gives it, once it is safe to use on the current stream."""

    def __init__(self, finish: Callable[[], Result], *works: dist.Work) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._works = works
        self._value: Result

    def wait(self) -> Result:
        """The result; blocks (CPU) or makes the current stream wait (CUDA) the first time."""
        if self._finish is not None:
            for work in self._works:
                work.wait()
            self._value, self._finish, self._works = self._finish(), None, ()  # frees the buffers of the transfer
        return self._value

    def then(self, change: Callable[[Result], Other]) -> Pending[Other]:
        """The result of `change` once this one is there."""
        return Pending(lambda: change(self.wait()))


class SequenceComm:
    """One rank's view of the ranks that share a sequence.

    Every collective concatenates along dim 0, whose size may differ from rank to rank and be zero, must be issued by
    all ranks in the same order, and is invisible to autograd: the methods of attention and linear attention write
    their adjoints out. A group of one rank communicates nothing and gives the input back.

    Args:
        group: the process group; None is the default group.
        node_of_rank: node of each rank of the group, in group order; None says that all share one.
        axis: the mesh axis that the traffic is accounted to.

    Raises:
        ValueError: no process group exists, this process is not in it, or `node_of_rank` has another size.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, node_of_rank: Sequence[int] | None = None, axis: str = "context"
    ) -> None:
        if not dist.is_initialized():
            raise ValueError("no process group exists; call torch.distributed.init_process_group first")
        self.group = dist.group.WORLD if group is None else group
        self.axis = axis
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError(f"global rank {dist.get_rank()} is not in the {axis} group; only members build its comm")
        self.size = dist.get_world_size(self.group)
        self.ranks = tuple(dist.get_process_group_ranks(self.group))
        self.node_of_rank = (0,) * self.size if node_of_rank is None else tuple(node_of_rank)
        if len(self.node_of_rank) != self.size:
            raise ValueError(f"node_of_rank names {len(self.node_of_rank)} ranks; the {axis} group has {self.size}")
        label(self.group, axis, node_of_rank)

    def __repr__(self) -> str:
        return f"SequenceComm(rank={self.rank}, size={self.size}, axis={self.axis!r})"

    def all_gather(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """All ranks' tensors in rank order: [sizes[rank], ...] -> [sum(sizes), ...]; sizes None says all are equal."""
        return self.all_gather_async(x, sizes).wait()

    def all_gather_async(
        self, x: Tensor, sizes: Sequence[int] | None = None, *, exact: bool = False
    ) -> Pending[Tensor]:
        """As `all_gather`, under way on return; leave `x` unchanged until `wait()`.

        The backends gather equal sizes only. Uneven ones are padded to the largest, in one collective; `exact` sends
        them point to point if padding would add more than a quarter: P - 1 messages a rank, without padding.
        """
        sizes = self._sizes(sizes, x.shape[0])
        if x.shape[0] != sizes[self.rank]:
            raise ValueError(f"rank {self.rank} gathers {x.shape[0]} rows; sizes says {sizes[self.rank]}")
        if self.size == 1:
            return Pending(lambda: x)
        if exact and is_uneven(sizes):
            out = x.new_empty(sum(sizes), *x.shape[1:])
            parts = dict(enumerate(out.split(list(sizes))))
            parts.pop(self.rank).copy_(x.detach())
            sent = x.detach().contiguous()
            return self.exchange(dict.fromkeys(parts, sent), parts).then(lambda _: out)
        slot = max(sizes)
        padded = _padded(x.detach(), slot)  # [slot, ...]
        out = padded.new_empty(self.size * slot, *x.shape[1:])
        if out.numel() == 0:  # the same on all ranks
            return Pending(lambda: _without_padding(out, sizes, slot))
        work = dist.all_gather_into_tensor(out, padded, group=self.group, async_op=True)
        return Pending(lambda: _without_padding(out, sizes, slot), work)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """This rank's rows of the sum over ranks: [sum(sizes), ...] -> [sizes[rank], ...]; None says equal parts."""
        return self.reduce_scatter_async(x, sizes).wait()

    def reduce_scatter_async(self, x: Tensor, sizes: Sequence[int] | None = None) -> Pending[Tensor]:
        """As `reduce_scatter`, under way on return; leave `x` unchanged until `wait()`.

        Gloo's own reduces everything to everyone: twice the bytes (measured on the network interface). There, and where
        padding would add more than a quarter, ranks exchange the parts and each sums its own, in fp32 or wider and in
        rank order.
        """
        if sizes is None and x.shape[0] % self.size:
            raise ValueError(f"{x.shape[0]} rows do not part equally over {self.size} ranks; give sizes")
        sizes = self._sizes(sizes, x.shape[0] // self.size)
        if x.shape[0] != sum(sizes):
            raise ValueError(f"reduce_scatter takes {sum(sizes)} rows, the sum of sizes; got {x.shape[0]}")
        if self.size == 1:
            return Pending(lambda: x)
        slot, own = max(sizes), sizes[self.rank]
        if x.device.type == "cpu" or is_uneven(sizes):
            parts = self.all_to_all_async(x, sizes, [own] * self.size)  # [ranks * own, ...]
            return parts.then(lambda rows: _sum(rows.unflatten(0, (self.size, own))))
        padded = x.detach().contiguous()
        if min(sizes) < slot:
            padded = torch.cat([_padded(part, slot) for part in padded.split(list(sizes))])  # [ranks * slot, ...]
        out = padded.new_empty(slot, *x.shape[1:])
        if out.numel() == 0:
            return Pending(lambda: out)
        work = dist.reduce_scatter_tensor(out, padded, group=self.group, async_op=True)
        return Pending(lambda: out[:own], work)

    def all_to_all(self, x: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None) -> Tensor:
        """Rows for each rank, in rank order -> rows from each rank: [sum(send), ...] -> [sum(receive), ...].

        None says equal parts. `receive[s]` must be what rank s sends here.
        """
        return self.all_to_all_async(x, send, receive).wait()

    def all_to_all_async(
        self, x: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Pending[Tensor]:
        """As `all_to_all`, under way on return; leave `x` unchanged until `wait()`."""
        if (send is None or receive is None) and x.shape[0] % self.size:
            raise ValueError(f"{x.shape[0]} rows do not part equally over {self.size} ranks; give send and receive")
        send = self._sizes(send, x.shape[0] // self.size)
        receive = self._sizes(receive, x.shape[0] // self.size)
        if x.shape[0] != sum(send):
            raise ValueError(f"all_to_all takes {sum(send)} rows, the sum of send; got {x.shape[0]}")
        if send[self.rank] != receive[self.rank]:
            raise ValueError(f"rank {self.rank} sends itself {send[self.rank]} rows but expects {receive[self.rank]}")
        if self.size == 1:
            return Pending(lambda: x)
        source = x.detach().contiguous()
        out = source.new_empty(sum(receive), *x.shape[1:])
        work = dist.all_to_all_single(out, source, list(receive), list(send), group=self.group, async_op=True)
        return Pending(lambda: out, work)

    def exchange(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Pending[Mapping[int, Tensor]]:
        """Point to point: each tensor of `send` to its rank, each buffer of `receive` filled from its rank.

        Under way on return; touch neither until `wait()`, which gives `receive`. What a rank sends is what its peer
        receives, in shape and dtype; empty tensors do not travel. Ranks that neither send nor receive need not call: on
        NCCL a collective of the whole group must have made its communicator before.

        Args:
            send, receive: contiguous tensors by rank of this comm, at most one each way between two ranks.
        """
        for rank, tensor in (*send.items(), *receive.items()):
            if not 0 <= rank < self.size or rank == self.rank:
                others = f"the other ranks of {self.size}, for this is rank {self.rank}"
                raise ValueError(f"rank {rank} is no peer; peers are {others}")
            if not tensor.is_contiguous():
                raise ValueError(f"the tensor for rank {rank}, {[*tensor.shape]}, is not contiguous")
        # By peer, in one order on all ranks. Receives first: gloo tells the sender of each, in line behind its own sends
        # to that peer, and a sender waits to be told, so the two ways would take turns.
        operations = [
            dist.P2POp(kind, tensors[peer].detach(), self.ranks[peer], self.group)
            for kind, tensors in ((dist.irecv, receive), (dist.isend, send))
            for peer in sorted(tensors)
            if tensors[peer].numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(lambda: receive, *works)

    def _sizes(self, sizes: Sequence[int] | None, each: int) -> tuple[int, ...]:
        if sizes is None:
            return (each,) * self.size
        if len(sizes) != self.size:
            raise ValueError(f"sizes names {len(sizes)} ranks; the {self.axis} group has {self.size}")
        return tuple(sizes)


def _sum(parts: Tensor) -> Tensor:
    """[ranks, ...] -> [...]; in fp32 at least."""
    return parts.sum(0, dtype=torch.promote_types(parts.dtype, torch.float32)).to(parts.dtype)


def _padded(x: Tensor, slot: int) -> Tensor:
    """[n, ...] -> [slot, ...], contiguous; the rows added are zero, so that no stray NaN enters a sum."""
    if x.shape[0] == slot:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(slot - x.shape[0], *x.shape[1:])])


def _without_padding(x: Tensor, sizes: Sequence[int], slot: int) -> Tensor:
    """[ranks * slot, ...] -> [sum(sizes), ...]."""
    if min(sizes) == slot:
        return x
    return torch.cat([part[:size] for part, size in zip(x.split(slot), sizes, strict=True)])
