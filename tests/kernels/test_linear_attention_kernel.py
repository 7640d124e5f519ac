import time

import pytest
import torch

from lsys.kernels.linear_attention import linear_attention, segments
from lsys.kernels.linear_attention.grid import chunk_grid, chunk_size

PACKS = [[0, 1, 7, 31, 64, 65, 128, 301, 0], [16, 16], [64], [512, 64], [5] * 9, [0, 0], [], [127, 1, 33]]
DECAYS = ["none", "head", "token"]
# Largest difference from the definition in fp64, relative to 1 + its magnitude, decays and states in fp32 at least.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 4e-4, torch.bfloat16: 4e-2}
NAMES = ["o", "final state", "dq", "dk", "dv", "d initial", "d decay"]


def tensors(batch, tokens, sequences, decay, dtype, key_heads=2, heads=4, width=8, value_width=6, strength=0.05):
    """Leaves q, k, v, initial state and decay, and the gradients of o and of the final state."""
    generator = torch.Generator().manual_seed(tokens + key_heads)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = draw(batch, tokens, key_heads, width), draw(batch, tokens, key_heads, width)
    v, do = draw(batch, tokens, heads, value_width), draw(batch, tokens, heads, value_width)
    state, d_state = (draw(sequences, heads, width, value_width).to(wide) for _ in range(2))
    shape = {"none": None, "head": (heads,), "token": (batch, tokens, heads)}[decay]
    log_decay = None if shape is None else -(draw(*shape).abs() * strength).to(wide)
    leaves = [None if x is None else x.requires_grad_() for x in (q, k, v, state, log_decay)]
    return leaves, do, d_state


def run(leaves, do, d_state, **options):
    q, k, v, state, log_decay = leaves
    o, after = linear_attention(q, k, v, log_decay, initial_state=state, output_final_state=True, **options)
    loss = (o * do).sum() + (after * d_state).sum()
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None], materialize_grads=True)
    return [o.detach(), after.detach(), *grads]


def quadratic(q, k, v, state, log_decay, lengths):
    """Each token against all before it: o [1, T, H, V] and final states, without any recurrence."""
    heads, (_, _, key_heads, width) = v.shape[2], q.shape
    decay = torch.zeros_like(v[..., 0]) if log_decay is None else log_decay.expand(v.shape[:3])
    outputs, after = [v[0, :0]], [state[:0]]
    keyed = (x[0].repeat_interleave(heads // key_heads, 1) for x in (q, k))
    parts = (x.split(lengths) for x in (*keyed, v[0], decay[0]))
    for qd, kd, vd, g, s in zip(*parts, state, strict=True):
        b = g.cumsum(0)
        later = torch.ones(len(qd), len(qd)).triu(1).bool()[..., None]
        weight = (b[:, None] - b).masked_fill(later, -torch.inf).exp()
        o = torch.einsum("ihk,jhk,ijh,jhv->ihv", qd, kd, weight, vd) + torch.einsum("ihk,ih,hkv->ihv", qd, b.exp(), s)
        outputs.append(o * width**-0.5)
        kept = g.sum(0).exp()[:, None, None] * s
        after.append((kept + torch.einsum("jhk,jh,jhv->hkv", kd, (g.sum(0) - b).exp(), vd))[None])
    return torch.cat(outputs)[None], torch.cat(after)


def compare(found, wanted, tolerance, case):
    for name, x, y in zip(NAMES, found, wanted, strict=False):
        assert x.shape == y.shape, (name, case)
        difference = ((x.double() - y.double()).abs() / (1 + y.double().abs())).flatten().tolist()
        assert max(difference, default=0) < tolerance, (name, case)


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("lengths", [[0, 1, 7, 19], [40]])
def test_the_definition_is_the_quadratic_form(decay, lengths):
    leaves, do, d_state = tensors(1, sum(lengths), len(lengths), decay, torch.float64)
    o, after = quadratic(*leaves, lengths)
    loss = (o * do).sum() + (after * d_state).sum()
    wanted = [o, after, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]
    compare(run(leaves, do, d_state, cu_seqlens=cu(lengths), backend="reference"), wanted, 1e-10, lengths)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_chunked_is_the_definition(decay, dtype, key_heads):
    for lengths in PACKS if key_heads == 2 else PACKS[-1:]:
        inputs = tensors(1, sum(lengths), len(lengths), decay, dtype, key_heads)
        exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs[0]]
        options = dict(cu_seqlens=cu(lengths))
        wanted = run(exact, *inputs[1:], **options, backend="reference")
        found = run(*inputs, **options, backend="chunked")
        compare(found, wanted, TOLERANCE[dtype], lengths)
        q, k, v, state, log_decay = inputs[0]
        alone, nothing = linear_attention(q, k, v, log_decay, initial_state=state, **options)
        assert nothing is None and torch.equal(alone, found[0])
        fresh, zero = linear_attention(q, k, v, log_decay, **options), torch.zeros_like(state)
        started, _ = linear_attention(q, k, v, log_decay, initial_state=zero, **options)
        compare([fresh[0]], [started], TOLERANCE[dtype], lengths)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_batch_is_sequences(decay):
    for tokens in (64, 77):
        inputs = tensors(3, tokens, 3, decay, torch.float64)
        compare(run(*inputs), run(*inputs, backend="reference"), 1e-10, tokens)


@pytest.mark.parametrize("size", [16, 64])
def test_chunks_cover_the_tokens_in_any_size(size, monkeypatch):
    monkeypatch.setattr("lsys.kernels.linear_attention.chunked.chunk_size", lambda *_: size)
    for decay in DECAYS:
        for lengths in ([3 * size, size], [size + 1, size - 1, 2 * size], [size]):
            inputs = tensors(1, sum(lengths), len(lengths), decay, torch.float64)
            options = dict(cu_seqlens=cu(lengths))
            compare(run(*inputs, **options), run(*inputs, **options, backend="reference"), 1e-10, (size, lengths))


def test_whole_chunks_are_views():
    device = torch.device("cpu")
    assert chunk_grid([64, 128], (), 64, device).slots is None
    x = torch.randn(192, 1, 5)
    cut = chunk_grid([64, 128], (), 64, device).cut(x, x.dtype)  # one head: no transposition either
    assert cut.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("strength", [50.0, 1e4])
def test_strong_decay_is_finite_and_right(dtype, decay, strength):
    lengths = [130, 5]
    inputs = tensors(1, 135, 2, decay, dtype, strength=strength)
    exact = [x.detach().double().requires_grad_() for x in inputs[0]]
    found = run(*inputs, cu_seqlens=cu(lengths))
    assert all(x.isfinite().all() for x in found)
    # A sum of large log-decays, whose differences are taken, is rounded in fp32: 2^-24 of it is the relative error.
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4 + strength * 64 * 2**-24
    compare(found, run(exact, *inputs[1:], cu_seqlens=cu(lengths), backend="reference"), tolerance, strength)


def test_the_state_matters():
    """With gentle decay, what comes from before the chunk is a good part of the output, so its loss is noticed."""
    (q, k, v, _, log_decay), _, _ = tensors(1, 512, 1, "head", torch.float64)
    with_states = linear_attention(q, k, v, log_decay)[0]
    size = chunk_size([512], 8, 6)
    bounds = torch.arange(0, 513, size)
    without = linear_attention(q, k, v, log_decay, cu_seqlens=bounds)[0]
    assert (with_states - without).norm() > 0.1 * with_states.norm()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_changes_only_those_from_there_on(decay, dtype):
    lengths, begin = [50, 200, 30], 50
    inputs = tensors(1, 280, 3, decay, dtype)[0]
    before, _ = linear_attention(*inputs[:3], inputs[4], cu_seqlens=cu(lengths))
    for at in (0, 5, 31, 32, 33, 64, 127, 199):
        changed = [None if x is None else x.detach().clone() for x in inputs]
        for x in (*changed[:3], *(changed[4:] if decay == "token" else [])):
            x[0, begin + at] *= 3
        after, _ = linear_attention(*changed[:3], changed[4], cu_seqlens=cu(lengths))
        sees = torch.zeros(280, dtype=torch.bool)
        sees[begin + at : begin + 200] = True
        assert torch.equal(before[0, ~sees], after[0, ~sees]), at
        if dtype != torch.bfloat16:  # whose rounding hides small changes
            assert (before[0, sees] != after[0, sees]).flatten(1).any(1).all(), at


def test_many_short_documents_are_quick():
    (q, k, v, _, log_decay), do, _ = tensors(1, 70_000, 1, "token", torch.float32, 2, 2, 16, 16)
    start = time.perf_counter()
    o, _ = linear_attention(q, k, v, log_decay, cu_seqlens=torch.arange(0, 70_001, 7))
    o.backward(do)
    assert time.perf_counter() - start < 20  # one by one they take minutes
    alone, _ = linear_attention(*(x[:, -7:] for x in (q, k, v, log_decay)))
    assert torch.allclose(o[:, -7:], alone, atol=1e-5)


def test_unlinked_segments_have_no_states():
    (q, k, v, _, log_decay), _, _ = tensors(1, 75, 1, "head", torch.float64)
    parts = segments(q[0], k[0], v[0], log_decay, None, [5] * 15, [2, 7])
    segment_map = parts.segment_map()
    assert segment_map.before.shape[0] == 2 and segment_map.state.shape == (2, 4, 8, 6)
    assert torch.allclose(segment_map.transition, 5 * log_decay.expand(2, 4))


def test_chunk_size_follows_the_lengths():
    assert chunk_size([7] * 1000, 64, 64) == 16
    assert chunk_size([100_000], 64, 64) >= 32
    assert chunk_size([], 64, 64) in (16, 32, 64, 128, 256)


def test_wrong_uses_are_refused():
    q, v = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 4, 8)
    one, one_v = q[:1], v[:1]
    refused = [
        ((q, q, v), {"causal": False, "output_final_state": True}, "output_final_state needs causal=True"),
        ((q, q, v, None, v[..., 0] * 0 - 1), {}, "beta goes from -1 to -1; it lies in .0, 2."),
        ((q, q, v, None, torch.ones(2, 6, 2)), {}, "beta is .2, 6, 2.; per token and head it begins .2, 6, 4."),
        (
            (q, q, v, -torch.ones(2, 6, 4, 7)),
            {},
            "log_decay is .12, 4, 7.; offered are per head, .4., token, .12, 4., key",
        ),
        ((q, q, v, -torch.ones(3)), {}, "log_decay is .3.; offered are per head, .4."),
        ((q, q, v, -torch.ones(6, 2, 4)), {}, "log_decay is .6, 2, 4.; .* it begins .2, 6, 4."),
        ((q, q, v * torch.nan), {}, "v has NaN, first at .0, 0, 0."),
        ((q, q, v, torch.ones(4)), {}, "log_decay reaches 1; a decay has a logarithm of at most 0"),
        ((q, q, v), {"cu_seqlens": torch.tensor([0, 6])}, "needs B = 1; got B = 2"),
        ((one, one, one_v), {"cu_seqlens": torch.tensor([0, 5])}, "it must go from 0 to T = 6"),
        ((one, one, one_v), {"cu_seqlens": torch.tensor([0, 5, 3, 6])}, "must not decrease; it does from 5 to 3"),
        ((one, one, one_v), {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "N . 1"),
        ((q, q, v), {"initial_state": torch.zeros(1, 4, 8, 8)}, "initial_state is .1, 4, 8, 8.; .* it .2, 4, 8, 8."),
        ((q, q, v), {"backend": "triton"}, "backend 'triton' is not one of: auto, reference, chunked"),
        ((q[0], q[0], v[0]), {}, "takes q, k .B, T, H_k, K."),
        ((q, q, v[:, :, :3]), {}, "2 key heads do not divide 3 value heads"),
        ((q, q[..., :4], v), {}, "q and k must have one shape"),
        ((q, q, v[:, :5]), {}, "q, k and v must share B and T"),
        ((q, q, v.double()), {}, "must share dtype and device"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            linear_attention(*arguments, **options)
