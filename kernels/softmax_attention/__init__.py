"""Softmax attention of packed sequences on one device."""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from lsys.kernels.softmax_attention import cpu, cuda, reference
from lsys.kernels.softmax_attention.merge import merge

__all__ = ["BACKENDS", "merge", "softmax_attention"]

BACKENDS = ("auto", "reference", "cpu", "cuda")


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q k^T + mask) v inside each packed sequence.

    Sequence i owns rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q and likewise of k and v; its queries stand at the
    last positions of its keys (flash-attention's varlen alignment), so that a causal query sees all keys up to its own
    position p, and with `window` w those from p - w + 1 on.

    Args:
        q: [Tq, H, D].
        k, v: [Tk, H_kv, D]; query head h reads key head h // (H / H_kv).
        cu_seqlens_q, cu_seqlens_k: integers [sequences + 1]. Best on the host: their values are needed there.
        scale: of the scores; default D**-0.5.
        backend: "reference" (plain PyTorch, any device, quadratic memory), "cpu" and "cuda" (PyTorch's flash kernels),
            or "auto", which logs its choice.

    Returns:
        o [Tq, H, D], differentiable in q, k and v, and the log-sum-exp of the scores [Tq, H], not differentiable, in
        fp32 (fp64 for fp64). A query without keys has o = 0 and log-sum-exp -inf.

    Raises:
        ValueError: sizes or options that do not fit together, or a chosen backend that cannot run on these tensors.
    """
    _check_tensors(q, k, v)
    lengths_q, lengths_k = _lengths("q", cu_seqlens_q, len(q)), _lengths("k", cu_seqlens_k, len(k))
    _check_mask(lengths_q, lengths_k, causal, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = _backend(backend, q)
    if chosen == "cpu":
        return cpu.attention(q, k, v, lengths_q, lengths_k, causal, window, scale)
    if chosen == "cuda":
        return cuda.attention(q, k, v, lengths_q, lengths_k, causal, window, scale)
    return reference.attention(q, k, v, lengths_q, lengths_k, causal, window, scale)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"attention takes q [Tq, H, D] and k, v [Tk, H_kv, D]; got {[*q.shape]}, {[*k.shape]} and {[*v.shape]}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share dtype and device; got {found}")


def _lengths(name: str, cu_seqlens: Tensor, rows: int) -> list[int]:
    lengths = cu_seqlens.diff().tolist()
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows:
        raise ValueError(f"cu_seqlens_{name} must go from 0 to the {rows} rows of {name}; got {cu_seqlens.tolist()}")
    if any(length < 0 for length in lengths):
        raise ValueError(f"cu_seqlens_{name} must not decrease; got {cu_seqlens.tolist()}")
    return lengths


def _check_mask(lengths_q: list[int], lengths_k: list[int], causal: bool, window: int | None) -> None:
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            f"cu_seqlens_q is of {len(lengths_q)} sequences, cu_seqlens_k of {len(lengths_k)}; they must agree"
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window is of 1 token or more and causal; got window={window}, causal={causal}")
    for i, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        if causal and n > m:
            raise ValueError(f"sequence {i} has {n} causal queries and {m} keys; each query stands at one of the keys")


def _backend(backend: str, q: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    obstacles = {"cpu": cpu.obstacle(q), "cuda": cuda.obstacle(q), "reference": None}
    if backend == "auto":
        chosen = next(name for name, obstacle in obstacles.items() if obstacle is None)
        _log_choice(chosen, q.device.type, q.dtype, q.shape[-1])
        return chosen
    if obstacles[backend] is not None:
        raise ValueError(f"attention backend {backend!r} cannot run here: {obstacles[backend]}")
    return backend


@lru_cache
def _log_choice(chosen: str, device: str, dtype: torch.dtype, width: int) -> None:
    logger = logging.getLogger(__name__)
    logger.info("softmax attention: %s backend, best for %s, %s, head width %d", chosen, device, dtype, width)
