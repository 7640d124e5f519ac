"""Linear attention over a sequence that is laid over ranks."""

from torch import Tensor

from lsys.kernels import linear_attention as kernel
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import lasp2
from lsys.parallel.linear.links import links

__all__ = ["METHODS", "linear_attention"]

METHODS = ("lasp2",)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    causal: bool = True,
    method: str = "lasp2",
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Linear attention inside each document, whichever ranks hold its tokens.

    All ranks of `comm` must call it, and backpropagate through its output, those without tokens too. Gradients are
    those of the sum of all ranks' losses.

    Args:
        q, k: [T_r, H_k, Dk], this rank's tokens in the layout's order; head h reads key head h // (H / H_k).
        v: [T_r, H, Dv].
        layout: any placement of the documents over the ranks.
        comm: the ranks; None is one rank.
        log_decay: natural logarithms of at most 0: None, [H] fixed per head, [T_r, H] per token, or [T_r, H, Dk] per key
            channel.
        beta: of the delta rule, [T_r, H] in [0, 2]; None without.
        initial_state: [documents, H, Dk, Dv], alike on all ranks; default zero.
        output_final_state: whether to return the states after all documents, on all ranks.
        causal: True.
        method: "lasp2": each rank gathers the states of all segments that share a document with other ranks, in one
            collective each way. Without such documents there is no collective.
        scale: default Dk**-0.5.
        backend: of the local attention, see `lsys.kernels.linear_attention`.

    Returns:
        o [T_r, H, Dv] in v's dtype, and the final states [documents, H, Dk, Dv] in fp32 (fp64 for fp64) or None. The
        gradients of replicated inputs ([H] decay, initial state) are this rank's part: their sum over ranks is whole.

    Raises:
        ValueError: tensors, layout, comm or options that do not fit together or do not exist.
    """
    if method not in METHODS:
        raise ValueError(f"linear attention method {method!r} is not one of: {', '.join(METHODS)}")
    if not causal:
        raise ValueError("causal=False is not offered across ranks; causal=True is")
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    if size != layout.ranks:
        remedy = "; comm=None is one rank" if comm is None else ""
        raise ValueError(f"the layout is over {layout.ranks} ranks and the comm has {size}{remedy}")
    _check_tensors(q, k, v, layout, rank, initial_state)
    has_initial = initial_state is not None
    exchange = links(layout, rank, has_initial, output_final_state, v.device)
    lengths = [segment.length for segment in layout.segments[rank]]
    parts = kernel.segments(q, k, v, log_decay, beta, lengths, exchange.linked, scale=scale, backend=backend)
    if not (any(exchange.sizes) or exchange.linked or output_final_state):  # a collective needs all ranks or none
        return parts.apply(parts.segment_map(), parts.intra(), None), None
    return lasp2.attention(parts, exchange, comm, initial_state, output_final_state)


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, rank: int, initial_state: Tensor | None
) -> None:
    shapes = f"{[*q.shape]}, {[*k.shape]} and {[*v.shape]}"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"linear attention takes q, k [T_r, H_k, Dk] and v [T_r, H, Dv]; got {shapes}")
    tokens = layout.tokens(rank)
    if not len(q) == len(k) == len(v) == tokens:
        raise ValueError(f"the layout gives rank {rank} {tokens} tokens; q, k and v are {shapes}")
    wanted = [len(layout.lengths), v.shape[1], k.shape[2], v.shape[2]]
    if initial_state is not None and [*initial_state.shape] != wanted:
        raise ValueError(f"initial_state is {[*initial_state.shape]}; [documents, H, Dk, Dv] makes it {wanted}")
