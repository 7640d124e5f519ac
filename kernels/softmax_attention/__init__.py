"""Softmax attention on one device: of packed sequences, and tile by tile for attention over many devices."""

import logging
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.kernels.softmax_attention import cpu, cuda, dense_scores
from lsys.kernels.softmax_attention.core import Attention, Backend, dense, planned
from lsys.kernels.softmax_attention.merge import merge
from lsys.kernels.softmax_attention.rows import Rows, add, put, take
from lsys.kernels.softmax_attention.tile import FAR, Tile, Tiles, sequences

__all__ = [
    "BACKENDS",
    "FAR",
    "Tile",
    "Tiles",
    "attend",
    "attend_backward",
    "attend_sequences",
    "empty_result",
    "sequences",
    "softmax_attention",
]

# In the order in which "auto" tries them.
_BACKENDS: dict[str, Backend] = {"flash_attn": cuda.PACKAGE, "cuda": cuda.ATEN, "cpu": cpu, "reference": dense_scores}
BACKENDS = ("auto", *_BACKENDS)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    window: int | None = None,
    mask: Mask | None = None,
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
        mask: instead of `causal` and `window`; of sequences that see themselves alone.
        scale: of the scores; default D**-0.5.
        backend: "flash_attn" (the package flash-attn), "cuda" and "cpu" (PyTorch's flash kernels), "reference" (plain
            PyTorch, any device, quadratic memory), or "auto", the first of these that can run, which it logs.

    Returns:
        o [Tq, H, D], differentiable in q, k and v, and the log-sum-exp of the scores [Tq, H], not differentiable, in
        fp32 (fp64 for fp64). A query without keys has o = 0 and log-sum-exp -inf.

    Raises:
        ValueError: sizes or options that do not fit together, or a chosen backend that cannot run on these tensors.
    """
    _check_tensors(q, k, v)
    lengths_q, lengths_k = _lengths("q", cu_seqlens_q, len(q)), _lengths("k", cu_seqlens_k, len(k))
    mask = Mask.of(mask, causal, window)
    _check_mask(lengths_q, lengths_k, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend_sequences(q, k, v, sequences(lengths_q, lengths_k, mask), scale=scale, backend=backend)


def attend_sequences(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, *, scale: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`softmax_attention` over tiles of which no two share a query: those of `sequences`, planned once for many calls.

    Args:
        q: [Tq, H, D].
        k, v: [Tk, H_kv, D].
        tiles: which queries see which keys.
        scale, backend: as for `softmax_attention`.

    Returns:
        As `softmax_attention`; o = 0 and log-sum-exp -inf where a query is in no tile.

    Raises:
        ValueError: sizes that do not fit together, or a chosen backend that cannot run on these tensors.
    """
    _check_tensors(q, k, v)
    tiles.check(len(q), len(k))
    return Attention.apply(q, k, v, tiles, scale, _backend(backend, q))


def empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """The result of attention over no keys, for `attend` to add to: o [Tq, H, D] of 0, lse [Tq, H] of -inf.

    Both are in fp32, in fp64 for q in fp64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(q.shape, dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=dtype)


@torch.no_grad()
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles | Iterable[Tile],
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
    backend: str = "auto",
) -> None:
    """Adds attention over the tiles to the running result, in place. Not differentiable: see `attend_backward`.

    A query and a key may meet in several calls and tiles at most once altogether; the order does not matter.

    Args:
        q: [Tq, H, D].
        k, v: [Tk, H_kv, D]; query head h reads key head h // (H / H_kv).
        tiles: which queries see which keys. A `Tiles` is checked and planned once, however many calls it serves.
        o, lse: [Tq, H, D] and [Tq, H], from `empty_result` or earlier calls.
        scale: of the scores.
        backend: see `softmax_attention`.

    Raises:
        ValueError: sizes that do not fit together, or a chosen backend that cannot run on these tensors.
    """
    _check_tensors(q, k, v)
    _check_accumulators(q.dtype, o=(o, q.shape), lse=(lse, q.shape[:2]))
    tiles, chosen = Tiles.of(tiles), _backend(backend, q)
    tiles.check(len(q), len(k))
    q, k, v = dense(q), dense(k), dense(v)
    for launch in planned(chosen, tiles, q):
        _merge(o, lse, launch.q, *chosen.forward(launch, q, k, v, scale))


def _merge(o: Tensor, lse: Tensor, rows: Rows, part: Tensor, part_lse: Tensor) -> None:
    """Merge another result into rows of the running one, in place."""
    if o.is_cuda and o.dtype == torch.float32 and find_spec("triton") is not None:
        from lsys.kernels.softmax_attention.merge_triton import merge_rows

        merge_rows(o, lse, rows, dense(part), part_lse)
        return
    total, total_lse = take(o, rows), take(lse, rows)
    merge(total, total_lse, part, part_lse)
    if not isinstance(rows, slice):  # what was taken was a copy
        put(o, rows, total)
        put(lse, rows, total_lse)


@torch.no_grad()
def attend_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    tiles: Tiles | Iterable[Tile],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    scale: float,
    backend: str = "auto",
) -> None:
    """Adds the tiles' exact share of the gradients to dq, dk and dv, in place.

    Args:
        do: [Tq, H, D], the gradient of o, in q's dtype.
        q, k, v, tiles, scale, backend: as for `attend`.
        o, lse: [Tq, H, D] and [Tq, H], the result over all tiles of these queries, wherever they were computed; o in
            q's dtype or that of lse.
        dq, dk, dv: in the shapes of q, k and v; fp32, fp64 for fp64.

    Raises:
        ValueError: sizes that do not fit together, or a chosen backend that cannot run on these tensors.
    """
    _check_tensors(q, k, v)
    _check_accumulators(q.dtype, lse=(lse, q.shape[:2]), dq=(dq, q.shape), dk=(dk, k.shape), dv=(dv, v.shape))
    if do.shape != q.shape or o.shape != q.shape or do.dtype != q.dtype:
        found = ", ".join(f"{[*x.shape]} {x.dtype}" for x in (do, o, q))
        raise ValueError(f"do and o must have q's shape, and do its dtype; got do, o, q of {found}")
    tiles, chosen = Tiles.of(tiles), _backend(backend, q)
    tiles.check(len(q), len(k))
    tensors = dense(do), dense(q), dense(k), dense(v), dense(o), lse
    for launch in planned(chosen, tiles, q):
        parts = chosen.backward(launch, *tensors, scale)
        for total, rows, part in zip((dq, dk, dv), (launch.q, launch.k, launch.k), parts, strict=True):
            add(total, rows, part)


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


def _check_accumulators(dtype: torch.dtype, **accumulators: tuple[Tensor, torch.Size]) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    for name, (x, shape) in accumulators.items():
        if x.shape != shape or x.dtype != wide:
            raise ValueError(f"{name} must be {[*shape]} in {wide}; got {[*x.shape]} in {x.dtype}")


def _lengths(name: str, cu_seqlens: Tensor, rows: int) -> Tensor:
    """Lengths of the sequences, on the host: int64 [sequences]."""
    bounds = cu_seqlens.to("cpu", torch.int64)
    if bounds.dim() != 1 or len(bounds) == 0 or int(bounds[0]) != 0 or int(bounds[-1]) != rows:
        raise ValueError(f"cu_seqlens_{name} must go from 0 to the {rows} rows of {name}; got {bounds.tolist()}")
    lengths = bounds.diff()
    if (lengths < 0).any():
        raise ValueError(f"cu_seqlens_{name} must not decrease; got {bounds.tolist()}")
    return lengths


def _check_mask(lengths_q: Tensor, lengths_k: Tensor, mask: Mask) -> None:
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            f"cu_seqlens_q is of {len(lengths_q)} sequences, cu_seqlens_k of {len(lengths_k)}; they must agree"
        )
    if not mask.is_own:
        raise ValueError(
            f"packed sequences see themselves alone, not {mask.documents}; lsys.parallel.attention has these"
        )
    if mask.causal and (lengths_q > lengths_k).any():
        i = int((lengths_q > lengths_k).nonzero()[0])
        counts = f"{int(lengths_q[i])} causal queries and {int(lengths_k[i])} keys"
        raise ValueError(f"sequence {i} has {counts}; each query stands at one of the keys")


def _backend(backend: str, q: Tensor) -> Backend:
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    if backend != "auto":
        if obstacle := _BACKENDS[backend].obstacle(q):
            raise ValueError(f"attention backend {backend!r} cannot run here: {obstacle}")
        return _BACKENDS[backend]
    passed: list[str] = []
    for name, candidate in _BACKENDS.items():
        obstacle = candidate.obstacle(q)
        if obstacle is None:
            _log_choice(name, q.device.type, q.dtype, q.shape[-1], "; ".join(passed))
            return candidate
        passed.append(f"not {name}: {obstacle}")
    raise ValueError(f"no attention backend can run here; {'; '.join(passed)}")


@lru_cache
def _log_choice(chosen: str, device: str, dtype: torch.dtype, width: int, passed: str) -> None:
    logger = logging.getLogger(__name__)
    why = passed or "the first choice"
    logger.info("softmax attention: %s backend for %s, %s, head width %d (%s)", chosen, device, dtype, width, why)
