"""Linear attention, of packed sequences, on one device: without decay, with fixed or gated decay, with the delta rule."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lsys.kernels.linear_attention.checks import check_direction, check_tensors, sequence_lengths, without_autocast
from lsys.kernels.linear_attention.chunked import ChunkedSegments, SegmentMap
from lsys.kernels.linear_attention.chunked.channel import ChannelChunks
from lsys.kernels.linear_attention.chunked.chunks import Chunks, Tokens
from lsys.kernels.linear_attention.chunked.delta import DeltaChunks
from lsys.kernels.linear_attention.chunked.scalar import ScalarChunks
from lsys.kernels.linear_attention.gpu import triton_refusal, triton_segments
from lsys.kernels.linear_attention.recurrence import ReferenceSegments
from lsys.kernels.linear_attention.transition import carry

__all__ = ["BACKENDS", "SegmentMap", "Segments", "diagonal", "linear_attention", "segments"]

BACKENDS = ("auto", "reference", "chunked", "triton")


class Segments(Protocol):
    """Segments of packed documents in two phases, between which states are exchanged.

    `segment_map` gives what each segment with external state does to a state; `intra` needs no state, so that it can run while maps
    are under way; `apply` completes the output, given the state [L, H, K, V] before each segment with external state (None is zero).
    The states of the first phase serve in the second. `intra` and `apply` are called once each, in this order.
    """

    def segment_map(self) -> SegmentMap: ...

    def intra(self) -> Tensor: ...

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor: ...


@without_autocast
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = e^(g_t) S_(t-1) + k_t v_t^T, o_t = scale q_t S_t, anew in each sequence.

    With beta, the delta rule (Schlag et al., 2021; Yang et al., 2024): what S says of k_t is replaced by v_t in part,
    S_t = (1 - beta_t k_t k_t^T) e^(g_t) S_(t-1) + beta_t k_t v_t^T. Keys are taken as given: normalise them before.
    Conventions of flash-linear-attention (Yang & Zhang, 2024). Differentiable in all tensors. Autocast is off inside.

    Args:
        q, k: [B, T, H_k, K]; head h reads key head h // (H / H_k).
        v: [B, T, H, V].
        log_decay: g, natural logarithms of at most 0 (checked on CPU): None, [H] fixed per head (Lightning, retention),
            [B, T, H] per token (Mamba-2), or [B, T, H, K] per token and key channel (GLA).
        beta: of the delta rule, [B, T, H] in [0, 2] (checked on CPU); None without.
        initial_state: [N, H, K, V], the states before the sequences; default zero.
        output_final_state: whether to return the states after the sequences.
        cu_seqlens: integers [N + 1], where each of N packed sequences begins, then T; needs B = 1. Best on the host.
            None: N = B sequences of T tokens.
        scale: default K**-0.5.
        causal: False also lets each token see those after it, by the same recurrence from the end: the mixing matrix is
            the causal one plus that of the reversed sequence, with the diagonal once (quasiseparable: Hydra, Hwang et
            al., 2024). There are no initial and final states then.
        backend: "reference" (token by token), "chunked" (matrix products), "triton" (CUDA, and interpreted on CPU), or
            "auto": triton on CUDA where it takes the dtype and widths, else chunked, logged.

    Returns:
        o [B, T, H, V] in v's dtype, and the final states [N, H, K, V] in fp32 (fp64 for fp64) or None.

    Raises:
        ValueError: shapes, values or options that do not fit together or do not exist.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"linear attention takes q, k [B, T, H_k, K], v [B, T, H, V]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q, k and v must share B and T; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    batch, tokens, heads, width = v.shape
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x is not None and x.dim() > 1 and x.shape[:3] != v.shape[:3]:
            raise ValueError(f"{name} is {[*x.shape]}; per token and head it begins {[*v.shape[:3]]}")
    check_direction(causal, initial_state, output_final_state)
    lengths = [tokens] * batch if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, tokens)
    wanted = [len(lengths), heads, k.shape[-1], width]
    if initial_state is not None and [*initial_state.shape] != wanted:
        raise ValueError(f"initial_state is {[*initial_state.shape]}; [N, H, K, V] makes it {wanted}")
    flat = Tokens(q, k, v, log_decay, beta).each(lambda x: x.flatten(0, 1))  # [B T, H ...]
    if causal:
        o, after = _attend(flat, lengths, initial_state, output_final_state, scale, backend)
    else:
        o, after = _both_ways(flat, lengths, scale, backend), None
    return o.unflatten(0, (batch, tokens)), after


def _both_ways(tokens: Tokens, lengths: Sequence[int], scale: float | None, backend: str) -> Tensor:
    """The sum of both directions, less the diagonal that both have; of half precision, in fp32."""
    dtype = torch.promote_types(tokens.v.dtype, torch.float32)
    there = tokens.each(lambda x: x.to(dtype))
    back = there.each(lambda x: x.flip(0))
    o = _attend(there, lengths, None, False, scale, backend)[0]
    o = o + _attend(back, lengths[::-1], None, False, scale, backend)[0].flip(0)
    return (o - diagonal(there.q, there.k, there.v, there.beta, scale)).to(tokens.v.dtype)


def _attend(
    tokens: Tokens,
    lengths: Sequence[int],
    initial: Tensor | None,
    final: bool,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """With a state [N, H, K, V] before each sequence or zero: the output [T, H, V] and, if `final`, the states after."""
    external = range(len(lengths)) if final or initial is not None else ()
    parts = segments(*tokens, lengths, external, scale=scale, backend=backend)
    whole = getattr(parts, "whole", None)  # both phases at once, where that is quicker
    if whole is not None:
        return whole(initial, final)
    segment_map = parts.segment_map()
    o = parts.apply(segment_map, parts.intra(), initial)
    return o, _final_state(segment_map, initial) if final else None


def segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    lengths: Sequence[int],
    external: Sequence[int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Segments:
    """The two phases of packed segments, for exchanges of states. Around all of them autocast has to be off, as `linear_attention` has it.

    Args:
        q, k: [T, H_k, K].
        v: [T, H, V].
        log_decay: None, [H], [T, H] or [T, H, K], at most 0 (checked on CPU).
        beta: None or [T, H], in [0, 2] (checked on CPU).
        lengths: tokens of each segment, zero allowed; their sum is T.
        external: the L segments with external state, ascending: those whose maps are wanted or which receive a state.
        scale, backend: as in `linear_attention`.

    Raises:
        ValueError: shapes or values that do not fit together, or a backend that does not exist.
    """
    check_tensors(q, k, v, log_decay, beta)
    if backend not in BACKENDS:
        raise ValueError(f"linear attention backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    tokens, scale = Tokens(q, k, v, log_decay, beta), k.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return ReferenceSegments(tokens, lengths, external, scale)
    if backend == "triton" or (backend == "auto" and v.device.type != "cpu"):
        refusal = triton_refusal(tokens)
        if refusal is None:
            if backend == "auto":
                _log_choice("triton", f"the fastest on {v.device.type}")
            return triton_segments(tokens, lengths, external, scale)
        if backend == "triton":
            raise ValueError(f"linear attention backend 'triton' {refusal}; backend 'chunked' computes it")
        _log_choice("chunked", f"since triton {refusal}", logging.WARNING)
    elif backend == "auto":
        _log_choice("chunked", f"the fastest on {v.device.type}")
    return ChunkedSegments(_chunks(log_decay, beta), tokens, lengths, external, scale)


def _chunks(log_decay: Tensor | None, beta: Tensor | None) -> type[Chunks]:
    if beta is not None:
        return DeltaChunks
    return ChannelChunks if log_decay is not None and log_decay.dim() == 3 else ScalarChunks


def diagonal(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, scale: float | None = None) -> Tensor:
    """What each token gets from itself: scale (beta_t) (q_t k_t) v_t, [T, H, V] in v's dtype."""
    wide = torch.promote_types(v.dtype, torch.float32)
    own = (q.to(wide) * k.to(wide)).sum(-1) * (k.shape[-1] ** -0.5 if scale is None else scale)  # [T, H_k]
    own = own.repeat_interleave(v.shape[1] // k.shape[1], dim=1)
    own = own if beta is None else own * beta.to(wide)
    return (own.unsqueeze(-1) * v.to(wide)).to(v.dtype)


def _final_state(segment_map: SegmentMap, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return segment_map.state
    return segment_map.state + carry(segment_map.transition, initial_state.to(segment_map.state.dtype))


@lru_cache
def _log_choice(backend: str, why: str, level: int = logging.INFO) -> None:
    """Once for each reason; what is not the fastest is a warning, which is shown where nobody set up logging."""
    logging.getLogger(__name__).log(level, "linear attention: %s backend, %s", backend, why)
