"""Linear attention on one device: what must not be seen, strong decay, long sequences, wrong uses."""

import logging
from typing import Any

import pytest
import torch
from support.comparing import largest
from support.linear_kernels import VARIANTS, cu, errors, run, tensors, with_gradients

from lsys.kernels.linear_attention import _log_choice, linear_attention, segments
from lsys.kernels.linear_attention.chunked import blocks
from lsys.kernels.linear_attention.chunked.channel import SMALLEST, ChannelChunks
from lsys.kernels.linear_attention.chunked.chunks import Tokens
from lsys.kernels.linear_attention.chunked.delta import DeltaChunks
from lsys.kernels.linear_attention.chunked.scalar import ScalarChunks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if "none" not in variant and variant != "delta"])
@pytest.mark.parametrize("strength", [50.0, 1e4])
def test_strong_decay_is_finite_and_right(dtype, variant, strength):
    lengths = [130, 5]
    inputs = tensors(variant, lengths, dtype, strength=strength)
    found = run(inputs, cu_seqlens=cu(lengths))
    assert all(x.isfinite().all() for x in found)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    wanted = run(inputs.exact(), cu_seqlens=cu(lengths), backend="reference")
    assert largest(errors(found, wanted).values()) < tolerance, errors(found, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_matters(variant):
    """What comes from before the chunk is a good part of the output, so its loss is noticed."""
    q, k, v, _, log_decay, beta = tensors(variant, [512], strength=0.02)[:6]
    of = DeltaChunks if beta is not None else ChannelChunks if variant == "channel" else ScalarChunks
    with_states = linear_attention(q, k, v, log_decay, beta)[0]
    bounds = torch.arange(0, 513, of.chunk_size([512], 8, 6))
    assert len(bounds) > 3
    without = linear_attention(q, k, v, log_decay, beta, cu_seqlens=bounds)[0]
    assert (with_states - without).norm() > 0.1 * with_states.norm()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_token_changes_only_those_from_there_on(variant, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 2**11)  # several blocks
    lengths, begin = [50, 200, 30], 50
    inputs = tensors(variant, lengths, dtype, strength=0.02)
    every: list[Any] = [x if x is None else x.detach() for x in inputs[:6]]
    q, k, v, _, log_decay, beta = every
    before, _ = linear_attention(q, k, v, log_decay, beta, cu_seqlens=cu(lengths))
    # In and at the edges of the smallest spans, of their halves, of chunks and of documents.
    for at in (0, 1, SMALLEST - 1, SMALLEST, 5, 15, 16, 31, 32, 33, 64, 127, 199):
        changed: list[Any] = [x if x is None else x.clone() for x in (q, k, v, log_decay, beta)]
        for x in changed:
            if x is not None and x.dim() > 1:
                x[0, begin + at] *= 3 if x is not changed[4] else 0.5
        after, _ = linear_attention(*changed, cu_seqlens=cu(lengths))
        sees = torch.zeros(280, dtype=torch.bool)
        sees[begin + at : begin + 200] = True
        assert torch.equal(before[0, ~sees], after[0, ~sees]), at
        if dtype != torch.bfloat16:  # whose rounding hides small changes
            sees[begin + at + 16 :] = False  # the delta rule forgets
            assert (before[0, sees] != after[0, sees]).flatten(1).any(1).all(), at


@pytest.mark.parametrize("variant", ["none", "token"])
def test_a_million_tokens_in_single_precision(variant):
    tokens = 2**20
    inputs = tensors(variant, [tokens], torch.float32, key_heads=1, heads=1, width=8, value_width=8, strength=1e-4)
    outputs = []
    for q, k, v, _, log_decay, _ in (inputs[:6], inputs.exact()[:6]):
        with torch.no_grad():
            outputs.append(linear_attention(q, k, v, log_decay, output_final_state=True))
    (o, after), (exact_o, exact_after) = outputs
    last = slice(-1000, None)  # where the sums are longest
    assert (o[:, last] - exact_o[:, last]).norm() < 1e-5 * exact_o[:, last].norm()
    assert after is not None and exact_after is not None
    assert (after - exact_after).norm() < 1e-5 * exact_after.norm()


def test_a_channel_s_decay_with_the_delta_rule_runs_in_chunks_on_any_device_and_says_so_once(caplog):
    """On tensors without values, of which no operation may ask: a GPU's would be waited for. No block is smaller than it must be."""
    _log_choice.cache_clear()
    lengths, tokens = [7, 0, 300], 307
    shapes = [(tokens, 2, 8), (tokens, 2, 8), (tokens, 4, 6), (tokens, 4, 8), (tokens, 4)]
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            inputs = [torch.empty(1, *shape, device="meta", requires_grad=True) for shape in shapes]
            o, _ = linear_attention(*inputs, cu_seqlens=cu(lengths))
            o.sum().backward()
            assert o.device.type == "meta" and all(x.grad is not None and x.grad.device.type == "meta" for x in inputs)
            leaves = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
            q, k, v, log_decay, beta = leaves
            parts: Any = segments(q, k, v, log_decay, beta, lengths, [0, 2])
            found = parts.segment_map()
            parts.apply(found, parts.intra(), found.state).sum().backward()
            assert found.transition.shape == (2, 4, 8, 8) and all(x.grad is not None for x in leaves)
    said = "linear attention: chunked backend, since triton has no decay per key channel with the delta rule"
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", said)]


def test_blocks_are_larger_where_operations_are_launches():
    few, many = (
        blocks.in_blocks(DeltaChunks, Tokens(x, x, x, None, None), [20000], None, False)
        for x in (torch.empty(20000, 4, 64, device=device) for device in ("meta", "cpu"))
    )
    assert len(few) == 1 and len(many) > 10


def test_wrong_uses_are_refused():
    q, v = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 4, 8)
    one, one_v = q[:1], v[:1]
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ((q, q, v), {"causal": False, "output_final_state": True}, "output_final_state needs causal=True"),
        ((q, q, v), {"causal": False, "initial_state": torch.zeros(2, 4, 8, 8)}, "initial_state needs causal=True"),
        ((q, q, v, None, v[..., 0] * 0 - 1), {}, "beta goes from -1 to -1; it lies in .0, 2."),
        ((q, q, v, None, v[..., 0] * 0 + 2.5), {}, "beta goes from 2.5 to 2.5; it lies in .0, 2."),
        ((q, q, v, None, v[..., 0] * torch.nan), {}, "beta has NaN, first at .0, 0."),
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
        ((q, q, v, torch.ones(2, 6, 4, 8)), {}, "log_decay reaches 1; a decay has a logarithm of at most 0"),
        ((q, q, v, torch.full((4,), -torch.inf)), {}, "log_decay has -inf; .* a large finite number"),
        ((q, q, v), {"cu_seqlens": torch.tensor([0, 6])}, "needs B = 1; got B = 2"),
        ((one, one, one_v), {"cu_seqlens": torch.tensor([0, 5])}, "it must go from 0 to T = 6"),
        ((one, one, one_v), {"cu_seqlens": torch.tensor([0, 5, 3, 6])}, "must not decrease; it does from 5 to 3"),
        ((one, one, one_v), {"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, "N . 1"),
        ((q, q, v), {"initial_state": torch.zeros(1, 4, 8, 8)}, "initial_state is .1, 4, 8, 8.; .* it .2, 4, 8, 8."),
        ((q, q, v), {"backend": "magic"}, "backend 'magic' is not one of: auto, reference, chunked"),
        ((q[0], q[0], v[0]), {}, "takes q, k .B, T, H_k, K."),
        ((q, q, v[:, :, :3]), {}, "2 key heads do not divide 3 value heads"),
        ((q, q[..., :4], v), {}, "q and k must have one shape"),
        ((q, q, v[:, :5]), {}, "q, k and v must share B and T"),
        ((q, q, v.double()), {}, "must share dtype and device"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            linear_attention(*arguments, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_makes_no_state_of_half_precision(variant):
    """Nor does a backward pass that is inside it too, of what is in chunks; of the definition, autograd's own steps are outside."""
    lengths = [300]  # over which states of bf16 would be off by 1e-3 and more
    inputs = tensors(variant, lengths, torch.float32, strength=0.002)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, cu_seqlens=cu(lengths), backend="chunked")
        q, k, v, state, log_decay, beta = inputs[:6]
        options = dict(initial_state=state, output_final_state=True, cu_seqlens=cu(lengths), backend="reference")
        by_definition = linear_attention(q, k, v, log_decay, beta, **options)
    wanted = run(inputs.exact(), cu_seqlens=cu(lengths), backend="chunked")
    for each in (found, with_gradients(inputs, *by_definition)):
        assert all(x.dtype == torch.float32 for x in each)
        off = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(each, wanted, strict=True)]
        assert largest(off) < 2e-5, off


@pytest.mark.parametrize("variant", ["none", "token", "delta token"])
def test_autocast_over_16k_tokens(variant):
    """The states of such lengths were off by 17% in bf16."""
    lengths = [1 << 14]
    inputs = tensors(variant, lengths, torch.float32, strength=1e-4)
    wanted = run(inputs, cu_seqlens=cu(lengths), backend="chunked")
    with torch.autocast("cpu", torch.bfloat16):
        found = run(inputs, cu_seqlens=cu(lengths), backend="chunked")
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
