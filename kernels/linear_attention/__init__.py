"""Linear attention with or without decay, of packed sequences, on one device."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from lsys.kernels.linear_attention.chunked import ChunkedSegments, SegmentMap
from lsys.kernels.linear_attention.reference import ReferenceSegments

__all__ = ["BACKENDS", "SegmentMap", "Segments", "check_options", "linear_attention", "segments"]

BACKENDS = ("auto", "reference", "chunked")


class Segments(Protocol):
    """Segments of packed documents in two phases, between which states are exchanged.

    `segment_map` gives what each linked segment does to a state; `intra` needs no state, so that it can run while maps
    are under way; `apply` completes the output, given the state [L, H, K, V] before each linked segment (None is zero).
    The states of the first phase serve in the second.
    """

    def segment_map(self) -> SegmentMap: ...

    def intra(self) -> Tensor: ...

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor: ...


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

    Conventions of flash-linear-attention (Yang & Zhang, 2024). Differentiable in all tensors.

    Args:
        q, k: [B, T, H_k, K]; head h reads key head h // (H / H_k).
        v: [B, T, H, V].
        log_decay: g, natural logarithms of at most 0 (checked on CPU): None, [H] fixed per head, or [B, T, H] per token.
        beta: of the delta rule, which is not offered: None.
        initial_state: [N, H, K, V], the states before the sequences; default zero.
        output_final_state: whether to return the states after the sequences.
        cu_seqlens: integers [N + 1], where each of N packed sequences begins, then T; needs B = 1. Best on the host.
            None: N = B sequences of T tokens.
        scale: default K**-0.5.
        causal: True.
        backend: "reference" (token by token), "chunked" (matrix products), or "auto", which logs its choice.

    Returns:
        o [B, T, H, V] in v's dtype, and the final states [N, H, K, V] in fp32 (fp64 for fp64) or None.

    Raises:
        ValueError: shapes or options that do not fit together or do not exist.
    """
    check_options(log_decay, beta, causal)
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"linear attention takes q, k [B, T, H_k, K], v [B, T, H, V]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q, k and v must share B and T; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if log_decay is not None and log_decay.dim() > 1 and log_decay.shape != v.shape[:-1]:
        raise ValueError(f"log_decay is {[*log_decay.shape]}; [H] or [B, T, H] make it {[*v.shape[:-1]]}")
    batch, tokens, heads, width = v.shape
    lengths = [tokens] * batch if cu_seqlens is None else _lengths(cu_seqlens, batch, tokens)
    wanted = [len(lengths), heads, k.shape[-1], width]
    if initial_state is not None and [*initial_state.shape] != wanted:
        raise ValueError(f"initial_state is {[*initial_state.shape]}; [N, H, K, V] makes it {wanted}")
    decay = log_decay.flatten(0, 1) if log_decay is not None and log_decay.dim() == 3 else log_decay
    linked = range(len(lengths)) if output_final_state or initial_state is not None else ()
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B, T, H, D] -> [B T, H, D]
    parts = segments(q, k, v, decay, lengths, linked, scale=scale, backend=backend)
    segment_map = parts.segment_map()
    o = parts.apply(segment_map, parts.intra(), initial_state).unflatten(0, (batch, tokens))
    return o, _final_state(segment_map, initial_state) if output_final_state else None


def segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    lengths: Sequence[int],
    linked: Sequence[int],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Segments:
    """The two phases of packed segments, for exchanges of states.

    Args:
        q, k: [T, H_k, K].
        v: [T, H, V].
        log_decay: None, [H] or [T, H], at most 0 (checked on CPU).
        lengths: tokens of each segment, zero allowed; their sum is T.
        linked: the L segments, ascending, whose maps are wanted or which receive a state.
        scale, backend: as in `linear_attention`.

    Raises:
        ValueError: shapes that do not fit together, a positive decay, or a backend that does not exist.
    """
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape; got {[*q.shape]} and {[*k.shape]}")
    if k.shape[1] == 0 or v.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {v.shape[1]} value heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share dtype and device; got {found}")
    if log_decay is not None:
        _check_decay(log_decay, v)
    if backend not in BACKENDS:
        raise ValueError(f"linear attention backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        return ReferenceSegments(q, k, v, log_decay, lengths, linked, scale)
    if backend == "auto":
        _log_choice(v.device.type)
    return ChunkedSegments(q, k, v, log_decay, lengths, linked, scale)


def check_options(log_decay: Tensor | None, beta: Tensor | None, causal: bool) -> None:
    """Refuse what does not exist, whatever the layout of the tensors."""
    if not causal:
        raise ValueError("causal=False is not offered by linear attention; causal=True is")
    if beta is not None:
        raise ValueError(
            "beta (the delta rule) is not offered by linear attention; no decay, fixed and gated decay are"
        )
    if log_decay is not None and log_decay.dim() == 4:
        raise ValueError(f"log_decay {[*log_decay.shape]} is per channel; offered are [H] and one per token and head")


def _check_decay(log_decay: Tensor, v: Tensor) -> None:
    heads = v.shape[1]
    if log_decay.shape not in (v.shape[:2], v.shape[1:2]):
        raise ValueError(
            f"log_decay is {[*log_decay.shape]}; offered are per head, [{heads}], and per token and head, {[*v.shape[:2]]}"
        )
    # On other devices the check would stall the stream.
    if log_decay.device.type == "cpu" and (log_decay > 0).any():
        raise ValueError(f"log_decay reaches {log_decay.max():.3g}; a decay has a logarithm of at most 0")


def _lengths(cu_seqlens: Tensor, batch: int, tokens: int) -> list[int]:
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences along T and needs B = 1; got B = {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens is [N + 1] with N >= 0; got {[*cu_seqlens.shape]}")
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to T = {tokens}")
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"cu_seqlens must not decrease; it does from {bounds[at]} to {bounds[at + 1]}")
    return lengths


def _final_state(segment_map: SegmentMap, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return segment_map.state
    initial = initial_state.to(segment_map.state.dtype)
    if segment_map.log_decay is not None:
        initial = initial * segment_map.log_decay.exp()[..., None, None]
    return segment_map.state + initial


@lru_cache
def _log_choice(device: str) -> None:
    logging.getLogger(__name__).info("linear attention: chunked backend, the fastest on %s", device)
