"""Short causal convolution and token shift over a sequence that is laid over ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels import short_convolution as kernel
from lsys.kernels.short_convolution.neighbours import Neighbours, neighbours
from lsys.parallel.comm import SequenceComm
from lsys.parallel.halo import check, halo_plan, halo_state_async, swap
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.segments import runs

BACKENDS = ("auto", "sliding", "triton")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = activation(bias + sum_j weight[:, W - 1 - j] x_(t - j)) inside each document, whichever ranks hold its tokens.

    Ranks exchange the W - 1 inputs before each segment; by shifted sums, while they compute those over their own. All ranks of `comm`
    must call it, and backpropagate through its output; gradients are those of the sum of all ranks' losses, and those of weight and
    bias, which all ranks hold, are this rank's part.

    Args:
        x: [T_r, C], this rank's tokens in the layout's order.
        weight: [C, W]; its last column is that of the token itself.
        layout: any placement of the documents over the ranks.
        comm: the ranks; None is one rank.
        bias: [C].
        activation: None or "silu".
        backend: "auto", "sliding" or "triton", see `lsys.kernels.short_convolution`; alike on all ranks.

    Returns:
        [T_r, C] in x's dtype.

    Raises:
        ValueError: tensors, layout, comm, activation or backend that do not fit together or do not exist.
    """
    rank = 0 if comm is None else comm.rank
    reach = weight.shape[-1] - 1 if weight.dim() == 2 else 0
    if not x.is_floating_point() or activation not in kernel.ACTIVATIONS:
        raise ValueError(f"x is {x.dtype} and activation {activation!r}; offered are floating point, None and silu")
    if backend not in BACKENDS:
        raise ValueError(f"short convolution backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    if kernel.fits(x, weight, bias) and kernel.is_fused(x, weight, activation, backend):
        return _fused(x, weight, layout, comm, bias, activation)
    pending = halo_state_async(x, layout, comm, max(reach, 0))  # [segments, W - 1, C]
    out, lengths = kernel.from_zero(x, weight, bias, layout.cu_seqlens(rank))
    return kernel.activate(kernel.enter(out, pending.wait(), weight, lengths), activation, x.dtype)


class _Plan(NamedTuple):
    """How a rank fetches rows, and what it makes of them.

    Attributes:
        send, receive: how many rows go to each peer and come from it.
        rows: that are sent, to all peers in the order of ranks; sent: the same, each once, ascending; place: where each of `rows` is
            among these. int64.
        near: of the T_r tokens and the rows received.
    """

    send: dict[int, int]
    receive: dict[int, int]
    rows: Tensor
    sent: Tensor
    place: Tensor
    near: Neighbours

    def to(self, device: torch.device) -> _Plan:
        moved = {name: getattr(self, name).to(device) for name in ("rows", "sent", "place", "near")}
        return self._replace(**moved)


def _plan(layout: SequenceLayout, rank: int, width: int) -> _Plan:
    halo, held = halo_plan(layout, rank, width - 1, False), layout.table(rank)
    ends = (held.start.clamp(max=width - 1) + held.length).cumsum(0)
    own = runs(ends - held.length, held.length)
    begin = (ends - held.length - held.start.clamp(max=width - 1)).repeat_interleave(held.length)
    source = torch.full((halo.rows,), -1, dtype=torch.int64)
    source[halo.near[1]], source[halo.far[1]] = halo.near[0], halo.tokens + halo.far[0]
    sent, place = halo.sent.unique(return_inverse=True)
    others = sum(halo.receive.values())
    near = neighbours(source, own, begin, others, width, sent)
    return _Plan(halo.send, halo.receive, halo.sent, sent, place, near)


def _fused(
    x: Tensor,
    weight: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    rank, width = check(x, layout, comm, weight.shape[1] - 1), weight.shape[1]
    plan = layout.derived(("convolution", rank, width), x.device, lambda: _plan(layout, rank, width))
    y: Tensor = _Convolution.apply(x, weight, bias, plan, comm, activation)
    return y


class _Convolution(torch.autograd.Function):
    """x [T_r, C], weight [C, W], bias [C] -> [T_r, C]: fetch the rows that are missing, then one kernel; backward the other way round."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: _Plan,
        comm: SequenceComm | None,
        activation: str | None,
    ) -> Tensor:
        from lsys.kernels.short_convolution.short_convolution_triton import forward

        x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
        others = swap(comm, x.index_select(0, plan.rows), plan.send, plan.receive).wait()
        ctx.plan, ctx.comm, ctx.activation = plan, comm, activation
        ctx.save_for_backward(x, others, weight, bias)
        return forward(x, others, weight, bias, plan.near, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from lsys.kernels.short_convolution.short_convolution_triton import backward

        # Under activation checkpointing this recomputes the forward pass, transfers included, before any gradient is sent.
        x, others, weight, bias = ctx.saved_tensors
        plan: _Plan = ctx.plan
        found = backward(x, others, weight, bias, plan.near, ctx.activation, dy.contiguous())
        own, theirs = found.kept.split([len(plan.sent), len(others)])
        returned = swap(ctx.comm, theirs, plan.receive, plan.send).wait()
        if len(plan.sent):
            found.x.index_copy_(0, plan.sent, own.index_add(0, plan.place, returned).to(x.dtype))
        d_bias = None if bias is None else found.bias.to(bias.dtype)
        return found.x, found.weight.to(weight.dtype), d_bias, None, None, None


def token_shift(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None) -> Tensor:
    """The token before each one in its document, zeros for the first (RWKV: Peng et al., 2023): x [T_r, ...] -> [T_r, ...].

    All ranks of `comm` must call it, and backpropagate through its output; otherwise as `short_convolution`.
    """
    rank = 0 if comm is None else comm.rank
    pending = halo_state_async(x, layout, comm, 1)  # [segments, 1, ...]
    starts = layout.cu_seqlens(rank, x.device)[:-1]
    return torch.cat([x[-1:], x[:-1]]).index_copy(0, starts, pending.wait().squeeze(1))
