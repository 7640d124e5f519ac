from typing import Any

import pytest
import torch
from support.comparing import largest
from support.linear_kernels import (
    DECAYS,
    PACKS,
    TOLERANCE,
    VARIANTS,
    cu,
    error,
    errors,
    mixing,
    parts,
    run,
    tensors,
    with_gradients,
)

from lsys.kernels.linear_attention import linear_attention, segments
from lsys.kernels.linear_attention.chunked import ChunkedSegments, blocks
from lsys.kernels.linear_attention.chunked.channel import ChannelChunks
from lsys.kernels.linear_attention.chunked.chunks import Tokens
from lsys.kernels.linear_attention.chunked.delta import DeltaChunks
from lsys.kernels.linear_attention.chunked.grid import chunk_grid
from lsys.kernels.linear_attention.chunked.scalar import ScalarChunks
from lsys.kernels.linear_attention.transition import carry


def quadratic(inputs, lengths):
    """Each token against all before it, decays as one exponential: o [1, T, H, V] and final states."""
    outputs, after = [inputs.v[0, :0]], [inputs.state[:0]]
    for (q, k, v, g, _), s in zip(parts(inputs, lengths), inputs.state, strict=True):
        b = torch.zeros_like(k) if g is None else g.cumsum(0)  # [T, H, K]
        total = b[-1] if len(b) else torch.zeros_like(s[..., 0])
        later = torch.ones(len(q), len(q)).triu(1).bool()[..., None, None]
        weight = (b[:, None] - b).masked_fill(later, -torch.inf).exp()
        o = torch.einsum("ihk,jhk,ijhk,jhv->ihv", q, k, weight, v) + torch.einsum("ihk,ihk,hkv->ihv", q, b.exp(), s)
        outputs.append(o * q.shape[-1] ** -0.5)
        kept = total.exp()[..., None] * s
        after.append((kept + torch.einsum("jhk,jhk,jhv->hkv", k, (total - b).exp(), v))[None])
    return torch.cat(outputs)[None], torch.cat(after)


def matrices(inputs, lengths):
    """By products of explicit matrices: o [1, T, H, V] and final states, which keys as queries read."""
    outputs, after = [inputs.v[0, :0]], [inputs.state[:0]]
    for (q, k, v, g, beta), s in zip(parts(inputs, lengths), inputs.state, strict=True):
        weight, start = mixing(q, k, g, beta)
        o = torch.einsum("hij,jhv->ihv", weight, v) + torch.einsum("hik,hkv->ihv", start, s)
        outputs.append(o * q.shape[-1] ** -0.5)
        if not len(q):
            after.append(s[None])
            continue
        rows = []
        for unit in torch.eye(q.shape[-1], dtype=q.dtype):  # row by row: what a unit query would read at the end
            weight, start = mixing(torch.cat([q[:-1], unit.expand_as(q[-1:])]), k, g, beta)
            rows.append(torch.einsum("hj,jhv->hv", weight[:, -1], v) + torch.einsum("hk,hkv->hv", start[:, -1], s))
        after.append(torch.stack(rows, 1)[None])
    return torch.cat(outputs)[None], torch.cat(after)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("lengths", [[0, 1, 7, 19], [40]])
def test_the_definition_is_the_quadratic_form(decay, lengths):
    inputs = tensors(decay, lengths)
    wanted = with_gradients(inputs, *quadratic(inputs, lengths))
    found = run(inputs, cu_seqlens=cu(lengths), backend="reference")
    assert largest(errors(found, wanted).values()) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_definition_is_a_product_of_matrices(variant):
    lengths = [0, 1, 5, 11]
    inputs = tensors(variant, lengths)
    wanted = with_gradients(inputs, *matrices(inputs, lengths))
    found = run(inputs, cu_seqlens=cu(lengths), backend="reference")
    assert largest(errors(found, wanted).values()) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_chunked_is_the_definition(variant, dtype, key_heads):
    for lengths in PACKS if key_heads == 2 else PACKS[-1:]:
        inputs, options = tensors(variant, lengths, dtype, key_heads=key_heads), dict(cu_seqlens=cu(lengths))
        wanted = run(inputs.exact(), **options, backend="reference")
        found = run(inputs, **options, backend="chunked")
        assert largest(errors(found, wanted).values()) < TOLERANCE[dtype], lengths
        q, k, v, state, log_decay, beta = inputs[:6]
        alone, nothing = linear_attention(q, k, v, log_decay, beta, initial_state=state, **options)
        assert nothing is None and torch.equal(alone, found[0])
        fresh, _ = linear_attention(q, k, v, log_decay, beta, **options)
        started, _ = linear_attention(q, k, v, log_decay, beta, initial_state=torch.zeros_like(state), **options)
        assert error(fresh, started) < TOLERANCE[dtype], lengths
        if sum(lengths):
            assert (started - alone).norm() > 0.1 * alone.norm()  # so the loss of the initial state fails


def packed(inputs) -> Tokens:
    """The tokens of a batch of one."""
    every: list[Any] = [x if x is None or x.dim() == 1 else x[0] for x in (*inputs[:3], *inputs[4:6])]
    return Tokens(*every)


def two_phases(inputs, lengths, external, backend):
    """Output, the states after the segments with external state and all gradients, by maps that are applied afterwards."""
    flat = packed(inputs)
    phases = segments(*flat, lengths, external, backend=backend)
    segment_map, intra, state = phases.segment_map(), phases.intra(), inputs.state[external]
    o = phases.apply(segment_map, intra, state if external else None)
    after = segment_map.state + carry(segment_map.transition, state)
    return with_gradients(inputs._replace(d_state=inputs.d_state[external]), o[None], after)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("external", [[0, 3, 4, 5], [4], []])
def test_two_phases_are_the_definition(variant, external):
    """Segments with external state of no, one and several chunks, and others."""
    lengths = [40, 3, 100, 0, 130, 5, 300]
    inputs = tensors(variant, lengths)
    wanted = two_phases(inputs, lengths, external, "reference")
    assert largest(errors(two_phases(inputs, lengths, external, "chunked"), wanted).values()) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("size", "block"), [(16, 1), (32, 2**11)])
def test_two_phases_by_blocks_are_the_definition(variant, size, block, monkeypatch):
    """Blocks of one and of several chunks: their borders are in segments with external state, in others, and beside empty ones."""
    monkeypatch.setattr(blocks, "BLOCK", block)
    for of in (ScalarChunks, ChannelChunks, DeltaChunks):
        monkeypatch.setattr(of, "chunk_size", staticmethod(lambda *_: size))
    lengths = [2 * size, 0, size + 3, 1, 0, 3 * size + 5, 5 * size, 0, 4]
    inputs = tensors(variant, lengths)
    for external in ([0, 1, 5, 7], [2, 3, 4], [6], [*range(9)], [1]):
        wanted = two_phases(inputs, lengths, external, "reference")
        assert largest(errors(two_phases(inputs, lengths, external, "chunked"), wanted).values()) < 1e-10, external


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_phases_give_any_gradient_alone(variant, monkeypatch):
    """Of the output or of the states alone, one tensor at a time: nodes that others count on need not run."""
    monkeypatch.setattr(blocks, "BLOCK", 2**10)
    lengths, external = [70, 0, 150, 9], [0, 2]
    inputs, found = tensors(variant, lengths), {}
    flat = packed(inputs)
    for backend in ("reference", "chunked"):
        phases = segments(*flat, lengths, external, backend=backend)
        segment_map, intra, state = phases.segment_map(), phases.intra(), inputs.state[external]
        o = phases.apply(segment_map, intra, state)
        after = segment_map.state + carry(segment_map.transition, state)
        losses = (o * inputs.do[0]).sum(), (after * inputs.d_state[external]).sum()
        asked = [(loss, x) for _ in range(2) for x in inputs.leaves for loss in losses]
        found[backend] = [
            torch.autograd.grad(loss, x, retain_graph=True, materialize_grads=True)[0] for loss, x in asked
        ]
    assert largest(map(error, found["chunked"], found["reference"])) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_phases_keep_inputs_and_a_state_a_chunk(variant):
    inputs = tensors(variant, [640, 100])
    flat = packed(inputs)
    given, kept = {x.untyped_storage().data_ptr() for x in inputs.leaves}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in given:
            kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        phases = segments(*flat, [640, 100], [0], backend="chunked")
        segment_map, intra = phases.segment_map(), phases.intra()
        o = phases.apply(segment_map, intra, inputs.state[[0]])
    assert isinstance(phases, ChunkedSegments)
    (chunks,) = {-(-640 // block.grid.size) for block in phases.work.external}
    transition = 0 if segment_map.transition is None else segment_map.transition[0].numel()
    assert sum(kept.values()) <= chunks * (segment_map.state[0].numel() + transition) + 3 * inputs.state[0].numel()
    assert not phases.work.handover.maps and o.grad_fn is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_sequences(variant):
    for tokens in (64, 77):
        inputs = tensors(variant, [tokens] * 3, batch=3)
        assert largest(errors(run(inputs), run(inputs, backend="reference")).values()) < 1e-10, tokens


@pytest.mark.parametrize(("size", "block"), [(16, 1), (64, 2**11)])
def test_chunks_and_blocks_cover_the_tokens_in_any_size(size, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)  # one chunk, two chunks
    for of in (ScalarChunks, ChannelChunks, DeltaChunks):
        monkeypatch.setattr(of, "chunk_size", staticmethod(lambda *_: size))
    for variant in VARIANTS:
        for lengths in ([3 * size, 0, size], [size + 1, size - 1, 5, 2 * size + 9]):
            inputs = tensors(variant, lengths)
            options = dict(cu_seqlens=cu(lengths))
            wanted = run(inputs, **options, backend="reference")
            assert largest(errors(run(inputs, **options), wanted).values()) < 1e-10, (variant, lengths)
            q, k, v, _, log_decay, beta = inputs[:6]
            fresh, definition = (
                linear_attention(q, k, v, log_decay, beta, **options, backend=backend)[0]
                for backend in ("auto", "reference")
            )
            assert error(fresh, definition) < 1e-10, (variant, lengths)


def test_whole_chunks_are_views():
    device = torch.device("cpu")
    assert chunk_grid([64, 128], (), 64, device).slots is None
    x = torch.randn(192, 1, 5)
    cut = chunk_grid([64, 128], (), 64, device).cut(x, x.dtype)  # one head: no transposition either
    assert cut.data_ptr() == x.data_ptr()


def test_many_short_documents_are_quick():
    inputs = tensors("token", [7] * 10_000, torch.float32, heads=2, width=16, value_width=16)
    q, k, v, _, log_decay, _ = inputs[:6]
    o, _ = linear_attention(q, k, v, log_decay, cu_seqlens=cu([7] * 10_000))
    o.backward(inputs.do)  # one by one, documents take minutes
    alone, _ = linear_attention(*(x[:, -7:] for x in (q, k, v, log_decay)))
    assert torch.allclose(o[:, -7:], alone, atol=1e-5)


def test_segments_without_external_state_have_no_states():
    q, k, v, _, log_decay, _ = tensors("head", [75])[:6]
    phases = segments(q[0], k[0], v[0], log_decay, None, [5] * 15, [2, 7])
    segment_map = phases.segment_map()
    assert isinstance(phases, ChunkedSegments) and segment_map.transition is not None
    assert sum(len(update) for update, _ in phases.work.handover.maps) == 2 and segment_map.state.shape == (2, 4, 8, 6)
    assert torch.allclose(segment_map.transition, 5 * log_decay.expand(2, 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_external_state_maps_have_the_form_of_the_variant(variant):
    inputs = tensors(variant, [5, 9])
    flat = packed(inputs)
    found, wanted = (segments(*flat, [5, 9], (), backend=backend).segment_map() for backend in ("auto", "reference"))
    assert found.state.shape == wanted.state.shape == (0, 4, 8, 6)
    assert (found.transition is None) == (wanted.transition is None)
    same = found.transition, wanted.transition
    assert same[0] is None or (same[1] is not None and same[0].shape == same[1].shape)


def test_chunk_size_follows_the_lengths():
    for of in (ScalarChunks, ChannelChunks, DeltaChunks):
        assert of.chunk_size([7] * 1000, 64, 64) == 16
        assert of.chunk_size([100_000], 64, 64) >= 32
        assert of.chunk_size([], 64, 64) in (16, 32, 64, 128, 256)


def test_what_inference_keeps_serves_training():
    q, k, v, _, log_decay, beta = tensors("delta token", [43, 290])[:6]
    with torch.inference_mode():
        o, _ = linear_attention(q, k, v, log_decay, beta, cu_seqlens=cu([43, 290]))
    again, _ = linear_attention(q, k, v, log_decay, beta, cu_seqlens=cu([43, 290]))
    again.sum().backward()
    assert torch.equal(o, again) and q.grad.isfinite().all()
