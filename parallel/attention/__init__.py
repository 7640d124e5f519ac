"""Softmax attention over a sequence that is laid over ranks."""

from torch import Tensor

from lsys.parallel.attention import gather
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout

__all__ = ["METHODS", "softmax_attention"]

METHODS = ("gather",)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    *,
    method: str = "gather",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside each document, whichever ranks hold its tokens.

    All ranks of `comm` must call it, and backpropagate through its result, those without tokens too.

    Args:
        q: [T_r, H, D], this rank's tokens in the layout's order.
        k, v: [T_r, H_kv, D]; query head h reads key head h // (H / H_kv).
        layout: any placement of the documents over the ranks.
        comm: the ranks; None is one rank.
        method: "gather": each rank gathers all keys and values in one collective, and reduces their gradients in one.
        causal: a query sees its document up to its own position; otherwise the whole document.
        window: w limits a causal query at position p to positions p - w + 1 to p.
        scale: of the scores; default D**-0.5.
        backend: of the local attention, see `lsys.kernels.softmax_attention`.

    Returns:
        [T_r, H, D], differentiable in q, k and v.

    Raises:
        ValueError: tensors, layout, comm or options that do not fit together.
    """
    if method not in METHODS:
        raise ValueError(f"attention method {method!r} is not one of: {', '.join(METHODS)}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window is of 1 token or more and causal; got window={window}, causal={causal}")
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    if size != layout.ranks:
        remedy = "; comm=None is one rank" if comm is None else ""
        raise ValueError(f"the layout is over {layout.ranks} ranks and the comm has {size}{remedy}")
    _check_tensors(q, k, v, layout.tokens(rank), rank)
    return gather.attention(q, k, v, layout, comm, causal=causal, window=window, scale=scale, backend=backend)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, tokens: int, rank: int) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        shapes = f"{[*q.shape]}, {[*k.shape]} and {[*v.shape]}"
        raise ValueError(f"attention takes q [T_r, H, D] and k, v [T_r, H_kv, D]; got {shapes}")
    if len(q) != tokens or len(k) != tokens:
        raise ValueError(f"the layout gives rank {rank} {tokens} tokens; q has {len(q)} and k has {len(k)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
