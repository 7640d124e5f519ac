"""NCCL's rule of order, and what each rank of a group issues: whether the programs of all ranks come to their ends.

What a rank hands to a communicator at once is a group: one batch of sends and receives, or a collective. NCCL runs a rank's
groups in the order in which it issues them, each when the one before it has ended, so ranks that issue theirs in different
orders wait for each other for ever. Gloo matches messages by pair of ranks: runs on CPUs do not show it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from lsys.parallel import comm as comm_module
from lsys.parallel.comm import SequenceComm

ROOT = Path(__file__).parents[2]
BATCH = "batch"  # the kind of a group of sends and receives; all other kinds are collectives


@dataclass(frozen=True)
class Group:
    """What one rank hands to its communicator at once.

    Attributes:
        kind: BATCH, or the name of a collective.
        sends, receives: bytes by peer; of a collective all others are peers, with 0 bytes if nothing travels.
        issuer: file and function that asked for it.
    """

    kind: str
    sends: Mapping[int, int]
    receives: Mapping[int, int]
    issuer: str = field(default="", compare=False)

    @property
    def peers(self) -> set[int]:
        """The ranks that it needs."""
        return {*self.sends, *self.receives}

    def meets(self, other: Group, rank: int, peer: int) -> bool:
        """Whether this group of `rank` and the other, of `peer`, send what the other one receives."""
        there, back = (self.sends.get(peer), self.receives.get(peer)), (other.receives.get(rank), other.sends.get(rank))
        return self.kind == other.kind and there == back


Queue = Sequence[Group]  # one rank's groups in the order of issue


# ---- the rule


def stuck(queues: Sequence[Queue]) -> dict[int, Group]:
    """By rank, the group that never ends; empty if all ranks come to the ends of their queues.

    Groups that are connected by messages end together, once all of them are at the heads of their queues. That is a little
    stricter than NCCL, which may let some of them go first: what ends here, ends there. In which order the sets that can end
    do so makes no difference, for they have no rank in common.
    """
    places = [0] * len(queues)
    heads = {rank: queue[0] for rank, queue in enumerate(queues) if queue}
    moved = [*heads]  # a set of groups becomes able to end only when one of its ranks comes to a new head
    while moved:
        together = _ending(moved.pop(), heads)
        for rank in together:
            places[rank] += 1
            if places[rank] < len(queues[rank]):
                heads[rank] = queues[rank][places[rank]]
            else:
                del heads[rank]
        moved += together
    return heads


def _ending(rank: int, heads: Mapping[int, Group]) -> set[int]:
    """The ranks whose heads end together with this rank's; none if it cannot end yet."""
    found, unseen = {rank}, [rank] if rank in heads else []
    while unseen:
        here = unseen.pop()
        for peer in heads[here].peers:
            if peer not in heads or not heads[here].meets(heads[peer], here, peer):
                return set()
            if peer not in found:
                found.add(peer)
                unseen.append(peer)
    return found & {*heads}


# ---- what ranks issue


class AloneComm(SequenceComm):
    """One rank's SequenceComm where the others do not exist; it runs under `queues_of`, which keeps what it issues.

    Its ranks have other numbers in the world than in the group, as on an axis of a mesh.
    """

    def __init__(self, rank: int, node_of_rank: Sequence[int]) -> None:
        self.issued: list[Group] = []
        self.group: Any = self  # what the stand-in for torch.distributed is given
        self.axis, self.rank, self.size = "context", rank, len(node_of_rank)
        self.ranks = tuple(10 + 3 * each for each in range(self.size))
        self.node_of_rank = tuple(node_of_rank)


def queues_of(node_of_rank: Sequence[int], program: Callable[[AloneComm], None]) -> list[Queue]:
    """What each rank issues when it runs the program by itself: all that it receives is zero, and there at once."""
    comms = [AloneComm(rank, node_of_rank) for rank in range(len(node_of_rank))]
    with mock.patch.object(comm_module, "dist", _Distributed):
        for comm in comms:
            program(comm)
    return [comm.issued for comm in comms]


class _Operation(NamedTuple):
    """In place of a P2POp."""

    way: str
    tensor: Tensor
    peer: int
    comm: AloneComm


class _Done:
    """In place of a Work."""

    def wait(self) -> None:
        pass


class _Distributed:
    """In place of torch.distributed for SequenceComm. Whatever else that would call, and this does not know, is an error."""

    P2POp, isend, irecv = _Operation, "send", "receive"

    @staticmethod
    def batch_isend_irecv(operations: Sequence[_Operation]) -> list[_Done]:
        comm = operations[0].comm
        ways: dict[str, dict[int, int]] = {"send": {}, "receive": {}}
        for way, tensor, peer, _ in operations:
            ways[way][comm.ranks.index(peer)] = tensor.nbytes
            if way == "receive":
                tensor.zero_()
        comm.issued.append(Group(BATCH, ways["send"], ways["receive"], _issuer()))
        return [_Done()]

    @staticmethod
    def all_gather_into_tensor(out: Tensor, x: Tensor, *, group: AloneComm, async_op: bool) -> _Done:
        assert out.nbytes == x.nbytes * group.size
        return _collective("all_gather", group, out, [x.nbytes] * group.size, [x.nbytes] * group.size)

    @staticmethod
    def reduce_scatter_tensor(out: Tensor, x: Tensor, *, group: AloneComm, async_op: bool) -> _Done:
        assert x.nbytes == out.nbytes * group.size
        return _collective("reduce_scatter", group, out, [out.nbytes] * group.size, [out.nbytes] * group.size)

    @staticmethod
    def all_to_all_single(
        out: Tensor, x: Tensor, receive: list[int], send: list[int], *, group: AloneComm, async_op: bool
    ) -> _Done:
        row = x.new_empty(1, *x.shape[1:]).nbytes
        return _collective("all_to_all", group, out, [rows * row for rows in send], [rows * row for rows in receive])


def _collective(kind: str, comm: AloneComm, out: Tensor, sends: Sequence[int], receives: Sequence[int]) -> _Done:
    out.zero_()
    there, back = ({peer: size for peer, size in enumerate(way) if peer != comm.rank} for way in (sends, receives))
    comm.issued.append(Group(kind, there, back, _issuer()))
    return _Done()


def _issuer() -> str:
    """Who called the comm: the nearest function outside its module."""
    frame = sys._getframe()
    while frame.f_code.co_filename in (__file__, comm_module.__file__):
        assert frame.f_back is not None
        frame = frame.f_back
    return _named(frame.f_code)


@cache
def _named(code: CodeType) -> str:
    return f"{Path(code.co_filename).resolve().relative_to(ROOT).as_posix()} {code.co_name}"
