"""The oracle of traffic: what each method of softmax attention communicates, to the byte, by the schedules that run.

`lsys.parallel.messages` counts the same by formulas; so do tests, of what is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.mask import CAUSAL, Mask
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages.attention import Shape
from lsys.parallel.messages.heads import Share, alone, shares
from lsys.parallel.messages.placement import is_uneven
from lsys.parallel.methods import SOFTMAX
from lsys.parallel.schedule import Schedule, Transfer, returns
from lsys.parallel.segments import count


class Messages(NamedTuple):
    """Messages that are under way together: int64 [messages]."""

    source: Tensor
    destination: Tensor
    bytes: Tensor


@dataclass(frozen=True)
class Traffic:
    """The messages of one call of `softmax_attention`, in the phases that follow one another."""

    forward: tuple[Messages, ...]
    backward: tuple[Messages, ...]

    def received(self, node_of_rank: Sequence[int]) -> Tensor:
        """Bytes received in a forward and a backward pass: int64 [2, ranks, 2], (forward, backward), (same node, across)."""
        total = torch.zeros(2, len(node_of_rank), 2, dtype=torch.int64)
        for sums, phases in zip(total, (self.forward, self.backward), strict=True):
            for messages in phases:
                sums += _by_rank(messages, messages.destination, node_of_rank)
        return total


def traffic(
    method: str,
    layout: SequenceLayout,
    shape: Shape,
    node_of_rank: Sequence[int],
    *,
    mask: Mask = CAUSAL,
) -> Traffic:
    """What `softmax_attention(..., method=method)` communicates.

    As on gloo: of a gather of nearly equal parts the padding counts; on NCCL a reduce-scatter of these is padded too.
    """
    row = SOFTMAX[method]
    if row.collective:
        return _gather(row.function()(layout, mask), layout.ranks, shape)
    groups = row.groups(node_of_rank, shape.heads)
    if len(groups[0]) == 1:  # `lsys.parallel.attention.ulysses` then goes by ranks, however the groups are listed
        groups = alone(node_of_rank, shape.heads)
    split = shares(shape.heads, shape.kv_heads, len(groups[0]))
    forward, backward = _ring(row.function()(layout.pooled(groups), mask), groups, split, shape)
    if len(groups[0]) > 1:
        sizes, unit = layout.sizes, shape.width * shape.itemsize
        everything, queries = [share.width for share in split], [share.queries for share in split]
        before = _messages(_heads(groups, lambda i, j, m, n: sizes[i] * everything[n] * unit))
        after = _messages(_heads(groups, lambda i, j, m, n: sizes[j] * queries[m] * unit))
        d_after = _messages(_heads(groups, lambda i, j, m, n: sizes[i] * queries[n] * unit))
        d_before = _messages(_heads(groups, lambda i, j, m, n: sizes[j] * everything[m] * unit))
        forward, backward = [before, *forward, after], [d_after, *backward, d_before]
    return Traffic(tuple(forward), tuple(backward))


def _heads(
    groups: Iterable[Sequence[int]], size: Callable[[int, int, int, int], int]
) -> Iterator[tuple[int, int, int]]:
    """Messages inside groups; size(source, destination, and their places in the group) in bytes."""
    for group in groups:
        for m, i in enumerate(group):
            yield from ((i, j, size(i, j, m, n)) for n, j in enumerate(group) if j != i)


def _ring(
    schedule: Schedule, groups: Sequence[Sequence[int]], split: Sequence[Share], shape: Shape
) -> tuple[list[Messages], list[Messages]]:
    """Forward, and backward, where the sums of gradients return beside the blocks of the next step."""
    rows = [2 * share.keys * shape.width for share in split]

    def messages(transfers: Iterable[Transfer], itemsize: int) -> Iterator[tuple[int, int, int]]:
        for transfer in transfers:
            source, destination, tokens = groups[transfer.source], groups[transfer.destination], count(transfer.parts)
            for member, numbers in enumerate(rows):
                yield source[member], destination[member], tokens * numbers * itemsize

    blocks = [[*messages(step.transfers, shape.itemsize)] for step in schedule.steps]
    sums = [[*messages(entry, shape.wide)] for entry in returns(schedule)]
    forward = [_messages(sent) for sent in blocks if sent]
    together = [a + b for a, b in zip([*blocks, []], sums, strict=True)]
    return forward, [_messages(sent) for sent in together if sent]


def _gather(schedule: Schedule, ranks: int, shape: Shape) -> Traffic:
    offered = {transfer.source: count(transfer.parts) for transfer in schedule.steps[0].transfers}
    if not offered:
        return Traffic((), ())
    sizes = [offered.get(rank, 0) for rank in range(ranks)]
    row = 2 * shape.kv_heads * shape.width
    pairs = [(i, j) for i in range(ranks) for j in range(ranks) if i != j]
    blocks = _messages((i, j, sizes[i] * row * shape.itemsize) for i, j in pairs)
    if not is_uneven(sizes):  # padded to the largest, around the ring
        each = (ranks - 1) * max(sizes) * row * shape.itemsize
        blocks = _messages((i, (i + 1) % ranks, each) for i in range(ranks))
    return Traffic((blocks,), (blocks, _messages((i, j, sizes[j] * row * shape.wide) for i, j in pairs)))


def _messages(sent: Iterable[tuple[int, int, int]]) -> Messages:
    return Messages(*torch.tensor([*sent], dtype=torch.int64).reshape(-1, 3).unbind(1))


def _by_rank(messages: Messages, end: Tensor, node_of_rank: Sequence[int]) -> Tensor:
    """Bytes at one end of the messages: int64 [ranks, 2], (same node, across)."""
    node = torch.tensor(node_of_rank)
    across = (node[messages.source] != node[messages.destination]).long()
    total = torch.zeros(len(node_of_rank) * 2, dtype=torch.int64)
    return total.index_add_(0, end * 2 + across, messages.bytes).view(-1, 2)
