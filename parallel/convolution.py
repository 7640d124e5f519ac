"""Short causal convolution and token shift over a sequence that is laid over ranks."""

import torch
from torch import Tensor

from lsys.kernels import short_convolution as kernel
from lsys.parallel.comm import SequenceComm
from lsys.parallel.halo import halo_state_async
from lsys.parallel.layout import SequenceLayout


def short_convolution(
    x: Tensor,
    weight: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y_t = activation(bias + sum_j weight[:, W - 1 - j] x_(t - j)) inside each document, whichever ranks hold its tokens.

    Ranks exchange the W - 1 inputs before each segment while they compute the sums over their own. All ranks of `comm` must call
    it, and backpropagate through its output; gradients are those of the sum of all ranks' losses, and those of weight and
    bias, which all ranks hold, are this rank's part.

    Args:
        x: [T_r, C], this rank's tokens in the layout's order.
        weight: [C, W]; its last column is that of the token itself.
        layout: any placement of the documents over the ranks.
        comm: the ranks; None is one rank.
        bias: [C].
        activation: None or "silu".

    Returns:
        [T_r, C] in x's dtype.

    Raises:
        ValueError: tensors, layout, comm or activation that do not fit together or do not exist.
    """
    rank = 0 if comm is None else comm.rank
    reach = weight.shape[-1] - 1 if weight.dim() == 2 else 0
    if not x.is_floating_point() or activation not in kernel.ACTIVATIONS:
        raise ValueError(f"x is {x.dtype} and activation {activation!r}; offered are floating point, None and silu")
    pending = halo_state_async(x, layout, comm, max(reach, 0))  # [segments, W - 1, C]
    out, lengths = kernel.from_zero(x, weight, bias, layout.cu_seqlens(rank))
    return kernel.activate(kernel.enter(out, pending.wait(), weight, lengths), activation, x.dtype)


def token_shift(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None) -> Tensor:
    """The token before each one in its document, zeros for the first (RWKV: Peng et al., 2023): x [T_r, ...] -> [T_r, ...].

    All ranks of `comm` must call it, and backpropagate through its output; otherwise as `short_convolution`.
    """
    rank = 0 if comm is None else comm.rank
    pending = halo_state_async(x, layout, comm, 1)  # [segments, 1, ...]
    starts = layout.cu_seqlens(rank, x.device)[:-1]
    return torch.cat([x[-1:], x[:-1]]).index_copy(0, starts, pending.wait().squeeze(1))
