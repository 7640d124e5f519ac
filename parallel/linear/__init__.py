"""Linear attention over documents that are laid over ranks: one function, several ways to exchange states."""

from torch import Tensor

from lsys.kernels.linear_attention import check
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import lasp2

__all__ = ["METHODS", "linear_attention"]

METHODS = {"lasp2": lasp2.attention}


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
    """Causal linear attention inside each document, wherever its tokens are: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t.

    Args:
        q, k: [T_r, H_k, Dk], v: [T_r, H, Dv], the tokens of this rank in the layout's order.
        comm: the ranks of the layout; None for a layout of one rank.
        log_decay: None, [H] (fixed) or [T_r, H] (per token), not positive.
        initial_state: [documents, H, Dk, Dv], alike on all ranks.
        method: "lasp2": one all-gather of states each way (LASP-2: Sun et al., 2025).
        backend: "auto" or "chunked".

    Returns:
        o [T_r, H, Dv], and the final state of each document [documents, H, Dk, Dv], alike on all ranks, or None.
        The gradients of replicated inputs ([H] decay, initial state) are this rank's part: sum them over the ranks.

    Raises:
        ValueError: sizes, methods or options that do not fit together.
    """
    ranks, rank = (1, 0) if comm is None else (comm.size, comm.rank)
    if ranks != layout.ranks:
        raise ValueError(
            f"the layout is of {layout.ranks} ranks, the communicator of {ranks}; make both of the same group"
        )
    if method not in METHODS:
        raise ValueError(f"linear attention method {method!r} is not one of: {', '.join(METHODS)}")
    if backend == "reference":
        raise ValueError("backend 'reference' has one phase and cannot exchange states; take 'chunked' or 'auto'")
    if v.dim() != 3 or len(v) != layout.tokens(rank):
        raise ValueError(
            f"rank {rank} of the layout holds {layout.tokens(rank)} tokens: v must be [T_r, H, Dv]; got {[*v.shape]}"
        )
    check(q, k, v, log_decay, beta, initial_state, len(layout.lengths), causal, backend)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return METHODS[method](q, k, v, layout, comm, log_decay, initial_state, output_final_state, scale)
