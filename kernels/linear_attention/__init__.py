"""Linear attention on one device: no decay, fixed decay per head (Lightning, retention), scalar gate per token (Mamba-2, simple GLA)."""

from collections.abc import Sequence

from lsys.kernels.linear_attention import chunked, reference
from lsys.kernels.linear_attention.grid import Chain, ChunkGrid, chunk_grid
from lsys.kernels.linear_attention.scan import scan, scan_adjoint
from torch import Tensor

__all__ = [
    "BACKENDS",
    "Chain",
    "ChunkGrid",
    "check",
    "chunk_grid",
    "chunked",
    "linear_attention",
    "scan",
    "scan_adjoint",
]

BACKENDS = ("auto", "reference", "chunked")


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
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t (conventions of flash-linear-attention).

    Args:
        q, k: [B, T, H_k, K]; value head h reads key head h // (H / H_k).
        v: [B, T, H, V].
        log_decay: g, not positive: None (no decay), [H] (fixed), or [B, T, H] (per token).
        beta: belongs to the delta rule, which does not exist here; must be None.
        initial_state: [N, H, K, V], of each sequence: N = B, or the number of packed sequences.
        cu_seqlens: integers [N + 1], where packed sequences begin, then T; needs B == 1. States never cross.
        scale: default K**-0.5.
        backend: "reference" (token by token), "chunked", or "auto", which is "chunked".

    Returns:
        o [B, T, H, V] in v's dtype, and the final states [N, H, K, V] in fp32 (fp64 for fp64), or None. Differentiable in everything.

    Raises:
        ValueError: sizes or options that do not fit together.
    """
    if v.dim() != 4 or q.dim() != 4:
        raise ValueError(
            f"linear attention takes q, k [B, T, H_k, K] and v [B, T, H, V]; got {[*q.shape]}, {[*v.shape]}"
        )
    batch, tokens = v.shape[:2]
    lengths = _lengths(cu_seqlens, batch, tokens)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    if log_decay is not None and log_decay.dim() == 3:
        log_decay = log_decay.flatten(0, 1)
    q, k, v = flat
    check(q, k, v, log_decay, beta, initial_state, len(lengths), causal, backend)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        o, final = reference.attention(q, k, v, log_decay, lengths, initial_state, scale)
    else:
        grid = chunk_grid(lengths, k.shape[-1], v.shape[-1])
        chunks = chunked.prepare(q, k, v, log_decay, grid, scale)
        maps = chunked.segment_map(chunks)
        o = chunked.apply(chunks, chunked.intra(chunks), maps, initial_state)
        final = maps.state
        if initial_state is not None:
            final = final + maps.log_decay.exp()[..., None, None] * initial_state.to(final.dtype)
    return o.view(batch, tokens, *o.shape[1:]), final if output_final_state else None


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    sequences: int,
    causal: bool,
    backend: str,
) -> None:
    """Refuse what does not fit together: q, k [T, H_k, K], v [T, H, V], log_decay None | [H] | [T, H], initial_state [sequences, H, K, V]."""
    tokens, heads, width = v.shape
    if q.shape != k.shape or len(k) != tokens:
        raise ValueError(
            f"q and k must share [T, H_k, K] and T with v; got {[*q.shape]}, {[*k.shape]} and v {[*v.shape]}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {heads} value heads")
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k and v must share a dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if beta is not None:
        raise ValueError("beta belongs to the delta rule, which is not available; leave it None")
    if not causal:
        raise ValueError("linear attention is causal here; causal=False is not available")
    if backend not in BACKENDS:
        raise ValueError(f"linear attention backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    if log_decay is not None:
        if log_decay.shape not in ((heads,), (tokens, heads)):
            raise ValueError(
                f"log_decay must be [H] = [{heads}] or [T, H] = [{tokens}, {heads}]; got {[*log_decay.shape]}"
            )
        if bool((log_decay > 0).any()):
            raise ValueError(
                f"log_decay must not be positive; its largest value is {float(log_decay.max())}: a state may only shrink"
            )
    wanted = (sequences, heads, k.shape[-1], width)
    if initial_state is not None and tuple(initial_state.shape) != wanted:
        raise ValueError(f"initial_state must be [sequences, H, K, V] = {[*wanted]}; got {[*initial_state.shape]}")


def _lengths(cu_seqlens: Tensor | None, batch: int, tokens: int) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (tokens,) * batch
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs sequences in one row; got a batch of {batch}: flatten it to [1, B * T, ...]"
        )
    ends: Sequence[int] = cu_seqlens.tolist()
    lengths = tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
    if not ends or ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must ascend from 0 to the {tokens} tokens; got {ends}")
    return lengths
