"""Attention tile by tile: `attend` and `attend_backward` against a dense definition."""

import random
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsys.kernels.softmax_attention import (
    _BACKENDS,
    Tile,
    Tiles,
    attend,
    attend_backward,
    attend_sequences,
    cpu,
    empty_result,
    softmax_attention,
)
from lsys.kernels.softmax_attention.tile import batches

BACKENDS = ("reference", "cpu")
SCALE = 0.3
# (queries, keys, first, last)
BANDS = {
    "full": (13, 29, None, None),
    "causal": (67, 67, None, 0),
    "past": (31, 130, None, 99),
    "more queries than keys": (130, 31, None, 0),
    "window": (211, 211, -18, 0),
    "window with past": (97, 150, 30, 53),
    "window wider than a mask": (301, 1901, 101, 1600),
    "window from the start": (701, 701, -598, 0),
    "remote window": (150, 150, 7, None),
    "remote window over many keys": (67, 1303, -5, None),
    "remote window, more queries than keys": (130, 31, -80, None),
    "one query, many keys": (1, 2003, 1000, None),
    "two queries, many keys": (2, 2003, None, 2001),
    "band before all keys": (20, 20, -30, -5),
    "band after some keys": (20, 40, 10, 15),
    "diagonal alone": (40, 40, 0, 0),
    "too late": (7, 13, 13, None),
    "too early": (7, 13, None, -7),
    "empty band": (7, 13, 3, 2),
    "no queries": (0, 7, None, None),
    "no keys": (7, 0, None, None),
    "one pair": (1, 1, None, 0),
}
# Largest difference, relative to 1 + magnitude.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def inputs(
    queries, keys, heads=(2, 2), width=8, dtype=torch.float64, seed=0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, heads[0], width)] * 2 + [(keys, heads[1], width)] * 2
    q, do, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v, do


def visible(tiles, queries, keys):
    """Which query sees which key; no pair in two tiles."""
    count = torch.zeros(queries, keys, dtype=torch.int64)
    for tile in tiles:
        i = torch.arange(tile.q.stop - tile.q.start)[:, None]
        j = torch.arange(tile.k.stop - tile.k.start)
        seen = torch.ones(len(i), len(j), dtype=torch.bool)
        if tile.last is not None:
            seen &= j <= i + tile.last
        if tile.first is not None:
            seen &= j >= i + tile.first
        count[tile.q, tile.k] += seen
    assert (count <= 1).all()
    return count.bool()


def dense(q, k, v, do, seen):
    """(o, lse, dq, dk, dv) of the definition, in fp64."""
    q, k, v = leaves = [x.double().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * SCALE
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.detach().logsumexp(-1)
    p = scores.masked_fill(~seen.any(1)[:, None], 0).softmax(-1) * seen.any(1)[:, None]
    o = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1))
    return o.detach(), lse.t(), *torch.autograd.grad(o, leaves, do.double())


def tiled(q, k, v, do, calls, backend):
    """(o, lse, dq, dk, dv) of the tiles of several calls."""
    o, lse = empty_result(q)
    for tiles in calls:
        attend(q, k, v, tiles, o, lse, scale=SCALE, backend=backend)
    grads = [torch.zeros_like(x, dtype=o.dtype) for x in (q, k, v)]
    for tiles in reversed(calls):
        attend_backward(do, q, k, v, o, lse, tiles, *grads, scale=SCALE, backend=backend)
    return o, lse, *grads


def check(got, expected, tolerance):
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.shape == y.shape and torch.equal(x.isinf(), y.isinf()), name
        error = ((x.double() - y).abs() / (1 + y.abs()))[~y.isinf()]
        assert error.numel() == 0 or error.max() < tolerance, (name, error.max())  # nan is not less


def padded(n, m, first, last):
    """A tile that begins and ends inside the tensors, and the tensors' rows."""
    return Tile(slice(2, 2 + n), slice(3, 3 + m), first, last), n + 4, m + 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("band", BANDS)
def test_every_band(backend, band):
    tile, queries, keys = padded(*BANDS[band])
    tensors = inputs(queries, keys)
    check(tiled(*tensors, [[tile]], backend), dense(*tensors, visible([tile], queries, keys)), TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("band", ["past", "window with past", "window wider than a mask", "remote window"])
def test_grouped_heads_in_every_precision(dtype, heads, band):
    tile, queries, keys = padded(*BANDS[band])
    tensors = inputs(queries, keys, heads, 24, dtype)
    got = tiled(*tensors, [[tile]], "cpu")
    assert all(x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for x in got)
    check(got, dense(*tensors, visible([tile], queries, keys)), TOLERANCE[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "flash_attn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("band", BANDS)
def test_every_band_on_cuda(backend, dtype, band):
    tile, queries, keys = padded(*BANDS[band])
    tensors = inputs(queries, keys, (6, 2), 20, dtype)
    if obstacle := _BACKENDS[backend].obstacle(tensors[0].cuda()):
        pytest.skip(obstacle)
    q, k, v, do = (x.cuda() for x in tensors)
    got = [x.cpu() for x in tiled(q, k, v, do, [[tile]], backend)]
    check(got, dense(*tensors, visible([tile], queries, keys)), TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 90),
    m=st.integers(0, 90),
    first=st.none() | st.integers(-95, 95),
    last=st.none() | st.integers(-95, 95),
    backend=st.sampled_from(BACKENDS),
)
def test_random_bands(n, m, first, last, backend):
    tile, queries, keys = padded(n, m, first, last)
    tensors = inputs(queries, keys)
    check(tiled(*tensors, [[tile]], backend), dense(*tensors, visible([tile], queries, keys)), TOLERANCE[torch.float64])


def cut(generator, length, pieces):
    """A range cut in pieces, some perhaps empty."""
    cuts = sorted(generator.randint(0, length) for _ in range(pieces - 1))
    return list(zip([0, *cuts], [*cuts, length], strict=True))


def partition(seed, lengths, window, pieces):
    """Causal documents, their queries and keys cut into tiles, dealt out to several calls in any order."""
    generator, tiles, start = random.Random(seed), [], 0
    for length in lengths:
        for a, b in cut(generator, length, pieces):
            for c, d in cut(generator, length, pieces):
                first = None if window is None else a - c - window + 1
                tiles.append(Tile(slice(start + a, start + b), slice(start + c, start + d), first, a - c))
        start += length
    generator.shuffle(tiles)
    return [tiles[a:b] for a, b in cut(generator, len(tiles), 3)]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.sampled_from([0, 1, 1, 7, 7, 13, 64, 101]), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 9, 70]),
    pieces=st.integers(1, 5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    backend=st.sampled_from(BACKENDS),
)
def test_blocks_added_in_any_order_are_the_whole(seed, lengths, window, pieces, dtype, backend):
    total = sum(lengths)
    calls = partition(seed, lengths, window, pieces)
    tensors = inputs(total, total, (4, 2), dtype=dtype, seed=seed)
    seen = visible([tile for tiles in calls for tile in tiles], total, total)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    check(tiled(*tensors, calls, backend), dense(*tensors, seen), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 40])
def test_blocks_equal_the_function_of_whole_sequences(backend, window):
    lengths = [7] * 30 + [1, 0, 300, 13]
    q, k, v, do = inputs(sum(lengths), sum(lengths))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, lse = softmax_attention(
        *leaves, cu_seqlens_q=bounds, cu_seqlens_k=bounds, window=window, scale=SCALE, backend=backend
    )
    expected = (o.detach(), lse, *torch.autograd.grad(o, leaves, do))
    check(tiled(q, k, v, do, partition(1, lengths, window, 4), backend), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9, 300])
def test_a_key_changes_only_the_queries_that_see_it(backend, dtype, window):
    lengths, at = [7] * 9 + [400, 11], 63 + 57  # token 57 of the long document
    total = sum(lengths)
    calls = partition(2, lengths, window, 3)
    q, k, v, do = inputs(total, total, (2, 1), 16, dtype)
    before, *_ = tiled(q, k, v, do, calls, backend)
    for x in (q, k, v):
        x[at] += 3
    after, *_ = tiled(q, k, v, do, calls, backend)
    changed = (before != after).flatten(1).any(1)
    seen = visible([tile for tiles in calls for tile in tiles], total, total)
    assert torch.equal(changed, seen[:, at])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_tile_covers_stays_empty(backend):
    tensors = inputs(9, 8)
    tiles = [Tile(slice(3, 5), slice(2, 6)), Tile(slice(0, 2), slice(0, 0)), Tile(slice(5, 9), slice(0, 3), 3, None)]
    o, lse, dq, dk, dv = tiled(*tensors, [[], tiles, tiles[1:]], backend)
    rest = [0, 1, 2, 5, 6, 7, 8]
    assert not o[rest].any() and (lse[rest] == -torch.inf).all() and not dq[rest].any()
    assert not dk[[0, 1, 6, 7]].any() and not dv[[0, 1, 6, 7]].any()
    assert all(x.isfinite().all() for x in (o, lse[3:5], dq, dk, dv)) and dk[2:6].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_larger_tensors_and_o_in_half_precision(backend):
    q, k, v, do = inputs(40, 50, (6, 2), dtype=torch.bfloat16)
    k, v = torch.stack((k, v), 1).unbind(1)  # as after one exchange of both
    tiles = [Tile(slice(0, 40), slice(0, 30)), Tile(slice(0, 40), slice(30, 50), -10, 5)]
    whole = tiled(q, k, v, do, [tiles], backend)
    o, lse = empty_result(q)
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    for h, g in ((slice(0, 3), slice(0, 1)), (slice(3, 6), slice(1, 2))):
        attend(q[:, h], k[:, g], v[:, g], tiles, o[:, h], lse[:, h], scale=SCALE, backend=backend)
        part = [x[:, heads] for x, heads in zip(grads, (h, g, g), strict=True)]
        attend_backward(
            do[:, h],
            q[:, h],
            k[:, g],
            v[:, g],
            o[:, h].to(q.dtype),
            lse[:, h],
            tiles,
            *part,
            scale=SCALE,
            backend=backend,
        )
    check((o, lse, *grads), [x.double() for x in whole], 3e-2)


def test_gradients_of_keys_that_many_blocks_share_are_summed_in_fp32():
    tokens, window = 2400, 2000
    q, k, v, _ = inputs(tokens, tokens, (1, 1), dtype=torch.bfloat16)
    bounds, grads = torch.tensor([0, tokens]), []
    for dtype, backend in ((torch.float64, "reference"), (torch.bfloat16, "cpu")):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o, _ = softmax_attention(*leaves, cu_seqlens_q=bounds, cu_seqlens_k=bounds, window=window, backend=backend)
        grads.append(torch.autograd.grad(o.sum(), leaves))
    for exact, got in list(zip(*grads, strict=True))[1:]:
        assert (got.double() - exact).abs().mean() < 2.5e-3 * exact.abs().mean()  # in bf16 it would be 3.6e-3


def test_work_and_memory_of_a_window_are_linear_in_tokens():
    tokens, window = 1 << 20, 512
    blocks = cpu.plan(Tiles.of([Tile(slice(0, tokens), slice(0, tokens), 1 - window, 0)]), torch.zeros(1))
    scores = 0
    for block in blocks:
        assert isinstance(block.q, slice) and isinstance(block.k, slice)
        scores += (block.q.stop - block.q.start) * (block.k.stop - block.k.start)
    assert scores < 1.3 * tokens * window
    masks = [piece.mask for block in blocks for piece in block.pieces if piece.mask is not None]
    held = {mask.data_ptr() - mask.storage_offset() * 4: mask.untyped_storage().nbytes() for mask in masks}
    assert sum(held.values()) < 2**20


TILE = st.builds(
    lambda a, n, b, m, first, last: Tile(slice(a, a + n), slice(b, b + m), first, last),
    *(st.integers(0, 12) for _ in range(4)),
    *(st.none() | st.integers(-14, 14) for _ in range(2)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(TILE, max_size=8))
def test_trimmed_tiles_hold_the_same_pairs_and_nothing_else(tiles):
    trimmed = Tiles.of(tiles).trimmed()
    pairs = [visible([tile], 24, 24).nonzero().tolist() for tile in tiles]
    assert [visible([tile], 24, 24).nonzero().tolist() for tile in trimmed] == [seen for seen in pairs if seen]
    for tile in trimmed:
        block = visible([tile], 24, 24)[tile.q, tile.k]
        assert block.any(0).all() and block.any(1).all()
        n, m = block.shape
        assert tile.first is None or not block[n - 1, 0]  # it binds the last query, at the first key
        assert tile.last is None or not block[0, m - 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(0, 2)), max_size=30), st.integers(1, 4))
def test_batches_are_as_few_as_can_be_and_hold_no_query_twice(spans, most):
    tiles = Tiles.of([Tile(slice(a, a + n), slice(0, kind + 1)) for a, n, kind in spans])
    found, bounds = batches(tiles, (tiles.m,))
    assert sorted(found) == sorted(tiles)
    held = [[*found][a:b] for a, b in pairwise(bounds.tolist())]
    for batch in held:
        assert len({tile.k.stop for tile in batch}) == 1
        assert all(a.q.stop <= b.q.start for a, b in pairwise(batch))
    covered = torch.zeros(3, 40, dtype=torch.int64)
    for a, n, kind in spans:
        covered[kind, a : a + n] += 1
    assert len(held) == covered.amax(1).sum()  # a query that is in so many tiles needs so many batches
    _, limited = batches(tiles, (tiles.m,), torch.full_like(tiles.m, most))
    assert limited.diff().tolist() == [min(most, len(b) - i) for b in held for i in range(0, len(b), most)]


def test_tiles_are_planned_once():
    q, k, v, do = inputs(13, 13, dtype=torch.float32)
    tiles, (o, lse) = Tiles.of([Tile(slice(0, 13), slice(0, 13), None, 0)]), empty_result(q)
    with mock.patch.object(cpu, "plan", wraps=cpu.plan) as plan:
        for layer in range(3):
            attend(q + layer, k, v, tiles, o, lse, scale=SCALE, backend="cpu")
            attend_backward(do, q, k, v, o, lse, tiles, *map(torch.zeros_like, (q, k, v)), scale=SCALE, backend="cpu")
            attend_sequences(q, k, v, tiles, scale=SCALE, backend="cpu")
        assert plan.call_count == 1
        attend(q.double(), k.double(), v.double(), tiles, o.double(), lse.double(), scale=SCALE, backend="cpu")
        assert plan.call_count == 2  # masks are of q's dtype


def test_small_tiles_of_a_shape_are_computed_together():
    tiles = Tiles.of([Tile(slice(i, i + 7), slice(i, i + 7), None, 0) for i in range(0, 70_000, 7)])
    assert len(cpu.plan(tiles, torch.zeros(1))) < 100
    assert all(isinstance(block.q, slice) for block in cpu.plan(tiles, torch.zeros(1)))  # back to back: no copies


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"o": torch.zeros(4, 2, 8).bfloat16()},
            r"o must be \[4, 2, 8\] in torch.float32; got \[4, 2, 8\] in torch.bf",
        ),
        ({"lse": torch.zeros(4, 3)}, r"lse must be \[4, 2\]"),
        ({"tiles": [Tile(slice(0, 5), slice(0, 4))]}, "the tiles need 5 rows of q, which has 4"),
        ({"tiles": Tiles.of([Tile(slice(0, 4), slice(1, 7))])}, "the tiles need 7 rows of k, which has 6"),
        ({"tiles": [Tile(slice(0, 4), slice(None))]}, r"rows slice\(None, None, None\) of k in a tile are no range"),
        ({"tiles": [Tile(slice(0, 4), slice(3, 1))]}, "rows 3 to 1 of k are no range"),
        ({"tiles": [Tile(slice(-1, 4), slice(0, 1))]}, "rows -1 to 4 of q are no range"),
        ({"tiles": [Tile(slice(0, 4, 2), slice(0, 1))]}, r"rows slice\(0, 4, 2\) of q in a tile are no range"),
        ({"backend": "cuda"}, "'cuda' cannot run here: the tensors are on cpu"),
        ({"backend": "flash_attn"}, "'flash_attn' cannot run here: the tensors are on cpu"),
        ({"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)}, "3 key heads do not divide 2 query heads"),
        ({x: torch.zeros(6, 2, 8, dtype=torch.int32) for x in "kv"}, "must share dtype and device"),
    ],
)
def test_wrong_uses_are_refused(change, message):
    call: dict[str, Any] = {"q": torch.zeros(4, 2, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8)}
    call |= {"tiles": [Tile(slice(0, 4), slice(0, 6))], "o": torch.zeros(4, 2, 8), "lse": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=message):
        attend(**(call | change), scale=1.0)


def test_whole_sequences_that_reach_beyond_the_rows_are_refused():
    q, tiles = torch.zeros(4, 2, 8), Tiles.of([Tile(slice(0, 5), slice(0, 4))])
    pytest.raises(ValueError, attend_sequences, q, q, q, tiles, scale=1.0).match("need 5 rows of q, which has 4")


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_integers_are_refused(backend):
    x, wide = torch.zeros(4, 2, 8, dtype=torch.int32), torch.zeros(4, 2, 8)
    refusals = "cannot run here: torch.int32|no attention backend can run here; not flash_attn:"
    with pytest.raises(ValueError, match=refusals):
        attend(x, x, x, [], wide, wide[..., 0], scale=1.0, backend=backend)


def test_wrong_gradients_are_refused():
    q, k, v, do = inputs(4, 6, dtype=torch.bfloat16)
    o, lse = empty_result(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    tiles = [Tile(slice(0, 4), slice(0, 6))]
    with pytest.raises(ValueError, match="dk must be"):
        attend_backward(do, q, k, v, o, lse, tiles, dq, dk.bfloat16(), dv, scale=1.0)
    with pytest.raises(ValueError, match="do and o must have q's shape"):
        attend_backward(do.float(), q, k, v, o, lse, tiles, dq, dk, dv, scale=1.0)
