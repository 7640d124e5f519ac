"""Attention by gathering the keys and values of all ranks (context parallelism of Llama 3, Meta, 2024).

One collective each way. A rank receives 2 T H_kv D elements, T the tokens of all ranks, and keeps for the backward pass
only the keys and values that its queries see (some twice: for each segment of a document, those before it).
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels import softmax_attention as kernel
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """q [T_r, H, D], k, v [T_r, H_kv, D] -> [T_r, H, D]."""
    rank = 0 if comm is None else comm.rank
    mask = (rank, causal, window)
    rows = layout.derived(("visible rows", *mask), k.device, lambda: _visible_rows(layout, *mask))
    cu_seqlens_k = layout.derived(("visible bounds", *mask), None, lambda: _visible_bounds(layout, *mask))
    keys = _GatherKeys.apply(torch.stack((k, v), dim=1), rows, layout.sizes, comm)
    o, _ = kernel.softmax_attention(
        q,
        *keys.unbind(1),  # [Tk, 2, H_kv, D] -> k, v [Tk, H_kv, D], views
        cu_seqlens_q=layout.cu_seqlens(rank),
        cu_seqlens_k=cu_seqlens_k,
        causal=causal,
        window=window,
        scale=scale,
        backend=backend,
    )
    return o


def visible_keys(layout: SequenceLayout, rank: int, causal: bool, window: int | None) -> Iterator[tuple[int, int]]:
    """Of each segment of the rank, the range of stream tokens that some query of the segment sees.

    Causal queries are thus the last of their keys, which is how the kernel aligns them.
    """
    offsets = layout.document_offsets.tolist()
    for document, start, length in layout.segments[rank]:
        first = 0 if window is None else max(0, start - window + 1)
        last = start + length if causal else layout.lengths[document]
        yield offsets[document] + first, offsets[document] + last


def _visible_rows(layout: SequenceLayout, rank: int, causal: bool, window: int | None) -> Tensor:
    """Rows of the gathered tokens (in rank order) that each segment sees, segment after segment: int64 [Tk]."""
    ranges = [torch.arange(start, stop) for start, stop in visible_keys(layout, rank, causal, window)]
    return layout.inverse()[torch.cat([torch.empty(0, dtype=torch.int64), *ranges])]


def _visible_bounds(layout: SequenceLayout, rank: int, causal: bool, window: int | None) -> Tensor:
    """Where each segment's keys begin among the visible rows, then their number: int64 [segments + 1]."""
    spans = visible_keys(layout, rank, causal, window)
    return torch.tensor([0, *accumulate(stop - start for start, stop in spans)])


class _GatherKeys(torch.autograd.Function):
    """[T_r, ...] of every rank, concatenated in rank order, then rows `index` of it: [len(index), ...].

    Backward: the gradients of rows taken several times, and by several ranks, are summed in fp32 (fp64 for fp64).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, sizes: tuple[int, ...], comm: SequenceComm | None) -> Tensor:
        ctx.save_for_backward(index)
        ctx.sizes, ctx.comm = sizes, comm
        gathered = x if comm is None else comm.all_gather(x, sizes)  # [T_r, ...] -> [T, ...]
        return gathered.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        total = wide.new_zeros(sum(ctx.sizes), *grad.shape[1:]).index_add_(0, index, wide)
        own = total if ctx.comm is None else ctx.comm.reduce_scatter(total, ctx.sizes)  # [T, ...] -> [T_r, ...]
        return own.to(grad.dtype), None, None, None
