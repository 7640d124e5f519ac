"""The oracle of traffic: what each method of linear attention communicates, to the byte, by the runs of a layout.

With S = H K V numbers, a state, W ranks and one document cut in W, each rank receives forward, and again backward:

    lasp1, zeco   S, the first rank nothing (the last backward), in W - 1 and W - 2 + blocks steps
    lasp2         (W - 1) S, and forward the transitions, in one collective
    ulysses       (W - 1) / W of its tokens' queries, keys, values and gates, and again of their outputs, in two
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear.chain import block_count, columns, hops
from lsys.parallel.linear.state_exchange_plan import Runs, all_runs
from lsys.parallel.messages.heads import shares
from lsys.parallel.messages.linear import Shape
from support.softmax_traffic import Messages, Traffic


def traffic(method: str, layout: SequenceLayout, shape: Shape, *, causal: bool = True, final: bool = False) -> Traffic:
    """What `linear_attention(..., method=method)` communicates, as on gloo: there no reduce-scatter is padded.

    Args:
        method: one of `lsys.parallel.linear.METHODS`.
        layout: of the tokens.
        shape: of the layer.
        causal: as for `linear_attention`.
        final: whether final states are wanted. Initial states, which all ranks have, cost nothing.
    """
    if layout.ranks == 1:
        return Traffic((), ())
    if method == "ulysses":
        return _heads(layout, shape, final)
    runs = all_runs(layout, causal)
    if method == "lasp2":
        return _gathered(runs, layout, shape, final)
    blocks = 1
    if method == "zeco":
        blocks = block_count(layout, causal, shape.state, shape.value_width)
    forward, backward = (_chained(runs, layout.ranks, shape, blocks, reverse) for reverse in (False, True))
    if final:
        sizes = torch.bincount(runs.rank[runs.place == runs.places - 1], minlength=layout.ranks)
        rows = [shape.state * size for size in sizes.tolist()]
        forward, backward = (*forward, *_all_gather(rows)), (*_reduce_scatter(rows), *backward)
    return Traffic(forward, backward)


def _chained(runs: Runs, ranks: int, shape: Shape, blocks: int, reverse: bool) -> tuple[Messages, ...]:
    """A phase for each step."""
    every = hops(runs, reverse)
    key = (every.step * ranks + runs.rank[every.source]) * ranks + runs.rank[every.destination]
    key, states = key.unique(return_counts=True)
    widths = torch.tensor([cut.stop - cut.start for cut in columns(shape.value_width, blocks)])
    step = ((key // ranks**2)[:, None] + torch.arange(blocks)).flatten()
    sent = (states[:, None] * (shape.state // shape.value_width) * widths).flatten()
    step, order = step.sort(stable=True)
    peers = key.repeat_interleave(blocks)[order] % ranks**2
    counts = step.unique_consecutive(return_counts=True)[1].tolist()
    columns_of = zip(*(x.split(counts) for x in (peers // ranks, peers % ranks, sent[order])), strict=True)
    return tuple(Messages(*each) for each in columns_of)


def _gathered(runs: Runs, layout: SequenceLayout, shape: Shape, final: bool) -> Traffic:
    rank = runs.rank[(runs.places > 1) | final]
    most = max(torch.bincount(rank, minlength=layout.ranks).tolist())
    more = len(layout.lengths) if final else 0  # the gradients of the final states
    forward = _all_gather([most * (shape.state + shape.transition)] * layout.ranks)
    return Traffic(forward, _all_gather([(most + more) * shape.state] * layout.ranks))


def _heads(layout: SequenceLayout, shape: Shape, final: bool) -> Traffic:
    split, sizes = shares(shape.heads, shape.key_heads, layout.ranks), layout.sizes
    inputs = [shape.token(share.queries, share.keys) for share in split]
    outputs = [share.queries * shape.value_width * shape.itemsize for share in split]
    before = _messages((i, j, sizes[i] * inputs[j]) for i, j in _pairs(layout.ranks))
    after = _messages((i, j, sizes[j] * outputs[i]) for i, j in _pairs(layout.ranks))
    d_after = _messages((i, j, sizes[i] * outputs[j]) for i, j in _pairs(layout.ranks))
    d_before = _messages((i, j, sizes[j] * inputs[i]) for i, j in _pairs(layout.ranks))
    rows = [len(layout.lengths) * shape.state // shape.heads * share.queries for share in split if final]
    return Traffic((before, after, *_all_gather(rows)), (*_reduce_scatter(rows), d_after, d_before))


def _all_gather(parts: list[int]) -> tuple[Messages, ...]:
    """Around the ring, each part padded to the largest; no phase without bytes."""
    ranks, slot = len(parts), max(parts, default=0)
    if slot == 0:
        return ()
    return (_messages((rank, (rank + 1) % ranks, (ranks - 1) * slot) for rank in range(ranks)),)


def _reduce_scatter(parts: list[int]) -> tuple[Messages, ...]:
    if not any(parts):
        return ()
    return (_messages((i, j, parts[j]) for i, j in _pairs(len(parts))),)


def _pairs(ranks: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(ranks) for j in range(ranks) if i != j]


def _messages(sent: Iterable[tuple[int, int, int]]) -> Messages:
    return Messages(*torch.tensor([*sent], dtype=torch.int64).reshape(-1, 3).unbind(1))
