"""When the other ranks came to the operations that this one waited for: what tells a wait for a rank from a transfer."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lsys.parallel.ledger.hooks import Call
from lsys.parallel.ledger.labels import Place, Places
from lsys.parallel.traffic import ANY

PIPELINE = "pipeline"
NEVER = -math.inf
FROM_ROOT = ("broadcast", "scatter")  # ranks other than the root wait for the root only


class Issues:
    """Operations of one group, or messages one way between two ranks, in their order.

    Attributes:
        begins: when this rank issued them.
        last: when the last rank did that this one had to wait for; None until it is known, or where that cannot be.
        near: the same of the ranks of this one's pipeline stage.
    """

    __slots__ = ("begins", "last", "near")

    def __init__(self) -> None:
        self.begins: list[float] = []
        self.last: list[float] | None = None
        self.near: list[float] | None = None


class Channel:
    """One group, and what its ranks issued in it since the last exchange.

    Args:
        stages: how many pipeline stages the group has ranks of, where it is not a pipeline's own. stage: this rank's.
    """

    def __init__(self, group: dist.ProcessGroup, place: Place, stage: int, stages: int, device: torch.device) -> None:
        self.group, self.place, self.device = group, place, device
        self.stage, self.stages = (stage, stages) if stages > 1 else (0, 1)
        self.restart()

    def restart(self) -> None:
        self.collectives = Issues()
        self.roots: list[float] = []  # when this rank issued what it is the root of
        self.follows: list[bool] = []  # whether this rank waits for the root only
        self.kinds = 0  # a checksum
        self.messages: defaultdict[tuple[int, str], Issues] = defaultdict(Issues)  # by group rank of the peer, and way

    def add(self, call: Call, begin: float) -> Issues:
        operation = call.operation
        rooted, is_root = operation.kind in FROM_ROOT, operation.peer == self.place.rank
        self.collectives.begins.append(begin)
        self.roots.append(begin if rooted and is_root else NEVER)
        self.follows.append(rooted and not is_root)
        self.kinds = zlib.crc32(operation.kind.encode(), self.kinds)
        return self.collectives

    def exchange(self, offset: float) -> bool:
        """Learn when the others issued what this rank issued (collective over the group); whether all did the same.

        Args:
            offset: how far this rank's clock is ahead of that of all, s.
        """
        count, messages = len(self.collectives.begins), sum(len(each.begins) for each in self.messages.values())
        claims = self._tensor([count, -count, self.kinds, -self.kinds, messages])
        dist.all_reduce(claims, dist.ReduceOp.MAX, group=self.group)
        most, least, top, bottom, messages = claims.tolist()
        agree = most == -least and top == -bottom
        if agree and count:
            self._exchange_collectives(offset)
        if messages:
            agree = self._exchange_messages(offset) and agree
        return agree

    def _exchange_collectives(self, offset: float) -> None:
        table = self._tensor([[NEVER] * len(self.roots)] * self.stages + [self.roots])  # [stages + 1, operations]
        table[self.stage] = self._tensor(self.collectives.begins)
        table -= offset
        dist.all_reduce(table, dist.ReduceOp.MAX, group=self.group)
        table += offset
        follows = torch.tensor(self.follows, device=self.device)
        last, near = (torch.where(follows, table[-1], row) for row in (table[:-1].amax(0), table[self.stage]))
        self.collectives.last, self.collectives.near = last.tolist(), near.tolist()

    def _exchange_messages(self, offset: float) -> bool:
        """The n-th message that a rank sends another is the n-th that the other receives from it."""
        pairs = [[self.messages[peer, way] for way in ("send", "recv")] for peer in range(len(self.place.ranks))]
        counts = self._tensor([[len(way.begins) for way in pair] for pair in pairs])  # [peers, 2]
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        same = (counts == theirs.flip(1)).tolist()  # what a rank sends, its peer receives
        agreed = [[way for way, ok in zip(*each, strict=True) if ok] for each in zip(pairs, same, strict=True)]
        # Receives first: with the peer, they are its sends.
        times = self._tensor([begin for ways in agreed for way in reversed(ways) for begin in way.begins]) - offset
        sizes, came = [sum(len(way.begins) for way in ways) for ways in agreed], torch.empty_like(times)
        dist.all_to_all_single(came, times, sizes, sizes, group=self.group)
        flat = [way for ways in agreed for way in ways]
        for way, issued in zip(flat, (came + offset).split([len(way.begins) for way in flat]), strict=True):
            way.last = way.near = torch.maximum(issued, self._tensor(way.begins)).tolist()
        return all(map(all, same))

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)


class Peers:
    """The labelled groups of this rank, in the same order on all ranks.

    Args:
        groups: in which operations are matched. Each rank lists those that it is in; for any two groups, all ranks that are
            in both list them in the same order. Of groups that the ledger does not tell apart, the first is taken.
        stages: global ranks of this rank's pipeline, in order.
    """

    def __init__(self, groups: Iterable[dist.ProcessGroup], stages: list[int], device: torch.device) -> None:
        places, stage = Places(), stages.index(dist.get_rank())
        self.channels: dict[tuple[str, tuple[int, ...]], Channel] = {}  # by axis and global ranks
        for group in groups:
            place = places(group, None)
            key = place.axis, place.ranks
            if len(place.ranks) > 1 and key not in self.channels:
                spanned = len(stages) if place.axis != PIPELINE and len(set(stages) & set(place.ranks)) > 1 else 1
                self.channels[key] = Channel(group, place, stage, spanned, device)
        self._between: dict[tuple[str, int], tuple[Channel, int] | None] = {}

    def add(self, call: Call, begin: float) -> Issues | None:
        """Take an operation that this rank issued at `begin`; None if it has no channel. It is the last of what it gives."""
        place, operation = call.place, call.operation
        if operation.kind not in ("send", "recv"):
            channel = self.channels.get((place.axis, place.ranks))
            return channel.add(call, begin) if channel else None
        found = self._channel_to(place.axis, place.ranks[operation.peer]) if operation.peer != ANY else None
        if found is None:
            return None
        issues = found[0].messages[found[1], operation.kind]
        issues.begins.append(begin)
        return issues

    def _channel_to(self, axis: str, peer: int) -> tuple[Channel, int] | None:
        """The smallest group of an axis that holds a global rank, and the place of that in it: the same at both ends."""
        if (axis, peer) not in self._between:
            holding = [each for (own, ranks), each in self.channels.items() if own == axis and peer in ranks]
            best = min(holding, key=lambda channel: len(channel.place.ranks), default=None)
            self._between[axis, peer] = (best, best.place.ranks.index(peer)) if best else None
        return self._between[axis, peer]

    def exchange(self, offset: float = 0.0) -> list[str]:
        """Learn when the other ranks issued what this one issued since the last exchange; all ranks call it together.

        Args:
            offset: how far this rank's clock is ahead of rank 0's, s.

        Returns:
            Axes in which ranks issued different operations: there nothing was learned of those.
        """
        differing = [channel.place.axis for channel in self.channels.values() if not channel.exchange(offset)]
        for channel in self.channels.values():
            channel.restart()
        return differing
