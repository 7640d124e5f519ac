"""Softmax attention over a sequence that is laid over ranks."""

import torch
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.kernels.not_finite import NotFiniteError
from lsys.parallel.attention import ulysses
from lsys.parallel.attention.executor import Options
from lsys.parallel.attention.select import Select
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.methods import SOFTMAX

__all__ = ["METHODS", "softmax_attention"]

METHODS = tuple(SOFTMAX)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    *,
    method: str = "ring",
    causal: bool = True,
    window: int | None = None,
    mask: Mask | None = None,
    select: Select | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside each document, and to others that it sees, whichever ranks hold their tokens.

    All ranks of `comm` must call it, and backpropagate through its result, those without tokens too. Methods differ in
    what they communicate (`lsys.parallel.methods`), not in the result; nothing needs to divide anything.

    Args:
        q: [T_r, H, D], this rank's tokens in the layout's order.
        k, v: [T_r, H_kv, D]; query head h reads key head h // (H / H_kv).
        layout: any placement of the documents over the ranks; local work has the fewest pieces if each rank holds its
            segments in the order of the stream.
        comm: the ranks; None is one rank.
        method: "ring": blocks of keys and values pass from rank to rank while each attends to the one in its hand, no
            further than they are needed. "gather": one collective brings each rank the keys and values that some other
            rank needs. "ulysses": ranks exchange heads for tokens and attend to all tokens with their share of heads.
            "usp": Ulysses inside a node (the comm's `node_of_rank`), a ring across nodes.
        causal: a query sees its document up to its own position; otherwise the whole document.
        window: w limits a causal query at position p to positions p - w + 1 to p.
        mask: instead of these two; also says which documents a document sees (`lsys.kernels.mask`). Alike on all ranks.
        select: of what the mask shows, what this call attends to (`lsys.parallel.attention.select`); nothing of it is kept.
        scale: of the scores; default D**-0.5.
        backend: of the local attention, see `lsys.kernels.softmax_attention`.

    Returns:
        [T_r, H, D], differentiable in q, k and v.

    Raises:
        ValueError: tensors, layout, comm or options that do not fit together; or a NaN in q, k or v, before anything is
            sent. A rank that raises alone leaves the others waiting for it until its process ends (gloo's connections
            then break; a launcher such as torchrun ends the others) or the group's timeout passes. On CUDA, where
            looking for a NaN would wait for the device, this is done in autograd's anomaly mode only.
    """
    mask = Mask.of(mask, causal, window)
    _check(q, k, v, layout, comm, method, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = Options(mask, scale, backend, select)
    row, nodes = SOFTMAX[method], (0,) if comm is None else comm.node_of_rank
    return ulysses.attention(q, k, v, layout, comm, row.function(), row.groups(nodes, q.shape[1]), options)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    method: str,
    mask: Mask,
) -> None:
    if method not in METHODS:
        raise ValueError(f"attention method {method!r} is not one of: {', '.join(METHODS)}")
    mask.documents.check(len(layout.lengths))
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    if size != layout.ranks:
        remedy = "; comm=None is one rank" if comm is None else ""
        raise ValueError(f"the layout is over {layout.ranks} ranks and the comm has {size}{remedy}")
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        shapes = f"{[*q.shape]}, {[*k.shape]} and {[*v.shape]}"
        raise ValueError(f"attention takes q [T_r, H, D] and k, v [T_r, H_kv, D]; got {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share dtype and device; got {found}")
    tokens = layout.tokens(rank)
    if len(q) != tokens or len(k) != tokens:
        raise ValueError(f"the layout gives rank {rank} {tokens} tokens; q has {len(q)} and k has {len(k)}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {q.shape[1]} query heads")
    if q.device.type == "cpu" or torch.is_anomaly_enabled():
        for name, x in (("q", q), ("k", k), ("v", v)):
            _check_numbers(name, x.detach(), layout, rank)


def _check_numbers(name: str, x: Tensor, layout: SequenceLayout, rank: int) -> None:
    if not x.sum().isnan():  # one pass without a mask; infinities of both signs sum to nan as well
        return
    rows = x.isnan().flatten(1).any(1).nonzero()
    if len(rows):
        row = int(rows[0])
        document, position = int(layout.documents(rank)[row]), int(layout.positions(rank)[row])
        place = f"row {row} of rank {rank}, token {position} of document {document}"
        raise NotFiniteError(f"{name} has a NaN in {place}, and {len(rows) - 1} more rows; find its source upstream")
