"""Linear attention over a sequence that is laid over ranks."""

from __future__ import annotations

from torch import Tensor

from lsys.kernels import linear_attention as kernel
from lsys.kernels.linear_attention.checks import check_direction, check_tensors, without_autocast
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import exchange
from lsys.parallel.linear.exchange import Inputs
from lsys.parallel.linear.state_exchange_plan import external_segments
from lsys.parallel.methods import STATE

__all__ = ["METHODS", "linear_attention"]

METHODS = tuple(STATE)


@without_autocast
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
    those of the sum of all ranks' losses. Methods differ in what they communicate (`lsys.parallel.methods`), not in
    the result; nothing needs to divide anything.

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
        causal: False also lets each token see those after it, by the same recurrence from the end of its document; both
            directions' states travel together. There are no initial and final states then.
        method: how states reach the tokens after them; documents that no two ranks share cost nothing, but for "ulysses".
            "lasp1": from rank to rank, one state in and one out for each stretch of a document that a rank holds.
            "lasp2": all ranks gather all states and transitions, in one collective each way.
            "zeco": as "lasp1", in blocks of which several are under way at the same time.
            "ulysses": none travels; ranks exchange heads for tokens and have whole documents for their share of heads.
        scale: default Dk**-0.5.
        backend: of the local attention, see `lsys.kernels.linear_attention`.

    Returns:
        o [T_r, H, Dv] in v's dtype, and the final states [documents, H, Dk, Dv] in fp32 (fp64 for fp64) or None. The
        gradients of replicated inputs ([H] decay, initial state) are this rank's part: their sum over ranks is whole.

    Raises:
        ValueError: tensors, layout, comm or options that do not fit together or do not exist, before anything is sent.
    """
    rank = _check(q, k, v, layout, comm, log_decay, beta, initial_state, output_final_state, causal, method, backend)
    inputs: Inputs = (q, k, v, log_decay, beta)
    row, alone = STATE[method], comm is None or comm.size == 1
    if row.whole and not alone:
        return row.function()(inputs, layout, comm, initial_state, output_final_state, causal, scale, backend)
    has_initial = initial_state is not None
    external = external_segments(layout, rank, causal, has_initial, output_final_state, v.device)
    lengths = layout.table(rank).length.tolist()
    parts = [kernel.segments(*inputs, lengths, external.segments[0], scale=scale, backend=backend)]
    if not causal:
        back = (q.flip(0), k.flip(0), v.flip(0), _flipped(log_decay), _flipped(beta))
        parts.append(kernel.segments(*back, lengths[::-1], external.segments[1], scale=scale, backend=backend))
    way = None if alone else row.function()(comm, layout, external, inputs)
    state_inputs: tuple[Tensor | None, ...] = (*inputs[1:], initial_state)  # by gradients of states
    if any(x is not None and x.requires_grad for x in state_inputs):
        state_inputs = (q, *state_inputs)  # whose gradient alone starts the backward exchange as well
    (o, *others), final = exchange.attention(parts, external, way, comm, initial_state, state_inputs)
    if others:
        o = o + others[0].flip(0) - kernel.diagonal(q, k, v, beta, scale)
    return o, final


def _flipped(x: Tensor | None) -> Tensor | None:
    """Tokens from the last to the first; what is of no token stays."""
    return x if x is None or x.dim() == 1 else x.flip(0)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    final: bool,
    causal: bool,
    method: str,
    backend: str,
) -> int:
    """The rank, if all fits."""
    if method not in METHODS:
        raise ValueError(f"linear attention method {method!r} is not one of: {', '.join(METHODS)}")
    if backend not in kernel.BACKENDS:
        raise ValueError(f"linear attention backend {backend!r} is not one of: {', '.join(kernel.BACKENDS)}")
    check_direction(causal, initial_state, final)
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    if size != layout.ranks:
        remedy = "; comm=None is one rank" if comm is None else ""
        raise ValueError(f"the layout is over {layout.ranks} ranks and the comm has {size}{remedy}")
    shapes = f"{[*q.shape]}, {[*k.shape]} and {[*v.shape]}"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(f"linear attention takes q, k [T_r, H_k, Dk] and v [T_r, H, Dv]; got {shapes}")
    tokens = layout.tokens(rank)
    if not len(q) == len(k) == len(v) == tokens:
        raise ValueError(f"the layout gives rank {rank} {tokens} tokens; q, k and v are {shapes}")
    wanted = [len(layout.lengths), v.shape[1], k.shape[2], v.shape[2]]
    if initial_state is not None and [*initial_state.shape] != wanted:
        raise ValueError(f"initial_state is {[*initial_state.shape]}; [documents, H, Dk, Dv] makes it {wanted}")
    if STATE[method].whole:  # others leave it to the kernel, which they call first
        check_tensors(q, k, v, log_decay, beta)
    return rank
