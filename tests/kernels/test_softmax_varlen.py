"""Tiles as launches of a variable-length flash kernel: grouping, gathering, adding back. The kernel is plain fp64."""

import random
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsys.kernels import softmax_attention as kernel
from lsys.kernels.mask import Mask
from lsys.kernels.softmax_attention import (
    Tile,
    Tiles,
    attend,
    attend_backward,
    cuda,
    empty_result,
    sequences,
    softmax_attention,
)
from lsys.kernels.softmax_attention.varlen import Varlen

SCALE = 0.3


def seen(launch):
    """As flash-attn 2 does it: bounds as long as the longest keys are none, and one missing bound is that length."""
    left, right = (-1 if bound >= launch.max_k else bound for bound in (launch.left, launch.right))
    bounded = left >= 0 or right >= 0
    left, right = (launch.max_k if bounded and bound < 0 else bound for bound in (left, right))
    ends = zip(launch.bounds_q.tolist(), launch.bounds_k.tolist(), strict=True)
    (a, b), rest = next(ends), list(ends)
    mask = torch.zeros(launch.bounds_q[-1], launch.bounds_k[-1], dtype=torch.bool)
    assert launch.bounds_q.dtype == launch.bounds_k.dtype == torch.int32
    for c, d in rest:
        n, m = c - a, d - b
        assert 0 < n <= launch.max_q and 0 < m <= launch.max_k
        age = torch.arange(n)[:, None] + m - n - torch.arange(m)
        mask[a:c, b:d] = (age <= left) & (age >= -right) if bounded else True
        a, b = c, d
    return mask


def scores(q, k, launch, scale):
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (torch.einsum("qhd,khd->hqk", q, keys) * scale).masked_fill(~seen(launch), -torch.inf)


def run(q, k, v, launch, scale):
    assert q.shape[-1] % 8 == 0
    s = scores(q, k, launch, scale)
    return torch.einsum("hqk,khd->qhd", s.softmax(-1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)), s.logsumexp(
        -1
    )


def run_backward(do, q, k, v, o, lse, launch, scale):
    assert lse.is_contiguous() and o.dtype == q.dtype == do.dtype
    groups = (k.shape[1], -1)
    p = (scores(q, k, launch, scale) - lse.unsqueeze(-1)).exp()
    dp = torch.einsum("qhd,khd->hqk", do, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    ds = p * (dp - (do * o).sum(-1).t().unsqueeze(-1)) * scale
    dq = torch.einsum("hqk,khd->qhd", ds, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, do)
    return dq, dk.unflatten(1, groups).sum(2), dv.unflatten(1, groups).sum(2)


@pytest.fixture(scope="module", autouse=True)
def plain():
    """Backend "cuda", with the plain kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernel._BACKENDS, "cuda", Varlen(lambda q: None, run, run_backward))
        yield


def inputs(queries, keys, seed=0, width=12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, do = torch.randn(2, queries, 4, width, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, keys, 2, width, generator=generator, dtype=torch.float64)
    return q, k, v, do


def tiled(q, k, v, do, tiles, backend):
    o, lse = empty_result(q)
    attend(q, k, v, tiles, o, lse, scale=SCALE, backend=backend)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    attend_backward(do, q, k, v, o, lse, tiles, *grads, scale=SCALE, backend=backend)
    return o, lse, *grads


def check(queries, keys, tiles, seed=0):
    tensors = inputs(queries, keys, seed)
    got, expected = (tiled(*tensors, tiles, backend) for backend in ("cuda", "reference"))
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11, msg=partial("{}: {}".format, name))


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 12),
    m=st.integers(0, 12),
    first=st.none() | st.integers(-14, 14),
    last=st.none() | st.integers(-14, 14),
)
def test_every_band_is_some_launches(n, m, first, last):
    check(n + 4, m + 5, [Tile(slice(2, 2 + n), slice(3, 3 + m), first, last)])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 12))
def test_tiles_that_share_queries_and_keys(seed, count):
    """Of the same band and of other bands, over disjoint and overlapping rows. Pairs may be seen twice here."""
    generator, tiles = random.Random(seed), []
    for _ in range(count):
        n, m = generator.choice([1, 5, 5, 9]), generator.choice([1, 5, 9, 9])
        a, b = generator.randrange(30 - n), generator.randrange(40 - m)
        band = generator.choice([(None, None), (None, m - n), (m - n - 2, m - n), (-2, None), (None, 0)])
        tiles.append(Tile(slice(a, a + n), slice(b, b + m), *band))
    check(30, 40, tiles, seed)


def test_packed_sequences_are_one_launch_without_copies():
    q = torch.zeros(24, 4, 8)
    for window, band in ((None, (-1, 0)), (4, (3, 0))):
        (launch,) = kernel._BACKENDS["cuda"].plan(
            sequences(torch.tensor([7, 0, 12, 5]), torch.tensor([9, 0, 12, 5]), Mask(window=window)), q
        )
        assert (launch.q, launch.k.stop, launch.left, launch.right) == (slice(0, 24), 26, *band)
        assert launch.bounds_q.tolist() == [0, 7, 19, 24] and (launch.max_q, launch.max_k) == (12, 12)


def test_tiles_of_one_band_are_one_launch():
    """Causal and remote tiles, as a rank of a ring meets them: a launch for each band, not for each tile."""
    tiles = [Tile(slice(i, i + 10), slice(i + 20, i + 35), None, 5) for i in range(0, 200, 20)]
    tiles += [Tile(slice(i, i + 10), slice(i, i + 10)) for i in range(0, 200, 20)]
    assert len(kernel._BACKENDS["cuda"].plan(Tiles.of(tiles), torch.zeros(200, 4, 8))) == 2
    twice = Tiles.of(tiles + tiles[:3])  # some queries, that is
    assert len(kernel._BACKENDS["cuda"].plan(twice, torch.zeros(200, 4, 8))) == 3


@pytest.mark.parametrize("lengths", [[(7, 9), (0, 3), (13, 13), (1, 1)], [(0, 0)], []])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"causal": False}])
def test_differentiable_function(lengths, options):
    pairs = torch.tensor([(0, 0), *lengths]).cumsum(0)
    tensors = inputs(*pairs[-1].tolist())
    results = []
    for backend in ("cuda", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        o, lse = softmax_attention(
            *leaves, cu_seqlens_q=pairs[:, 0], cu_seqlens_k=pairs[:, 1], backend=backend, **options
        )
        results.append((o.detach(), lse, *torch.autograd.grad(o, leaves, tensors[3])))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_calls_of_pytorchs_kernel_fit_its_signature():
    """On the meta device, which checks arguments and gives shapes."""
    q, k, v, do = (x.to("meta", torch.bfloat16) for x in inputs(24, 26))
    (launch,) = cuda.ATEN.plan(
        sequences(torch.tensor([7, 12, 5]), torch.tensor([9, 12, 5]), Mask(window=4)), torch.zeros(24, 4, 12)
    )
    launch = launch._replace(bounds_q=launch.bounds_q.to("meta"), bounds_k=launch.bounds_k.to("meta"))
    o, lse = cuda.ATEN.forward(launch, q, k, v, SCALE)
    assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (24, 4), torch.float32)
    for x, grad in zip((q, k, v), cuda.ATEN.backward(launch, do, q, k, v, o, lse, SCALE), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


def package_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
):  # fmt: skip
    """flash-attn 2.7's signature."""
    assert dropout_p == 0 and causal == (window_size_left < 0 and window_size_right == 0)
    names = ("bounds_q", "bounds_k", "max_q", "max_k", "left", "right")
    values = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size_left, window_size_right)
    o, lse = run(q, k, v, SimpleNamespace(**dict(zip(names, values, strict=True))), softmax_scale)
    return o, lse, None, None


def package_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    """flash-attn 2.7's signature."""
    assert dropout_p == 0 and softcap == 0 and alibi_slopes is None and not deterministic
    names = ("bounds_q", "bounds_k", "max_q", "max_k", "left", "right")
    values = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size_left, window_size_right)
    launch = SimpleNamespace(**dict(zip(names, values, strict=True)))
    for total, grad in zip(
        (dq, dk, dv), run_backward(dout, q, k, v, out, softmax_lse, launch, softmax_scale), strict=True
    ):
        total.copy_(grad)


@pytest.fixture
def package(monkeypatch):
    """A package flash-attn of plain functions; give it a version."""

    def install(version):
        functions = {"_flash_attn_varlen_forward": package_forward, "_flash_attn_varlen_backward": package_backward}
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(__version__=version))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", SimpleNamespace(**functions))
        cuda._missing.cache_clear()

    yield install
    cuda._missing.cache_clear()


def test_calls_of_the_package_fit_its_signature(package, monkeypatch):
    package("2.8.3.post1")
    assert cuda._missing() is None
    monkeypatch.setitem(kernel._BACKENDS, "cuda", Varlen(lambda q: None, cuda.PACKAGE.run, cuda.PACKAGE.run_backward))
    check(40, 40, [Tile(slice(0, 30), slice(0, 33), None, 3), Tile(slice(30, 40), slice(0, 10), -2, 0)])


def test_an_old_or_missing_package_is_an_obstacle(package, monkeypatch):
    package("2.6.3")
    assert cuda._missing() == "flash-attn 2.6.3 is older than 2.7"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    cuda._missing.cache_clear()
    missing = cuda._missing()
    assert missing is not None and missing.startswith("no usable package flash-attn")
