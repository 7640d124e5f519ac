"""PyTorch's flash attention for CUDA in its variable-length form, half precision (Dao, FlashAttention-2, 2023)."""

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MAX_WIDTH = 256


def obstacle(q: Tensor) -> str | None:
    """Why this backend cannot take q; None if it can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bfloat16 or float16, not {q.dtype}"
    return None if q.shape[-1] <= _MAX_WIDTH else f"head width {q.shape[-1]} is over {_MAX_WIDTH}"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [Tq, H, D], k, v [Tk, H_kv, D] -> o [Tq, H, D], lse [Tq, H]."""
    width = q.shape[-1]
    if width % 8:  # the kernel's granularity; zero columns change neither scores nor the other columns of o
        q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
    o, lse = _Attention.apply(q, k, v, lengths_q, lengths_k, causal, window, scale)
    return o[..., :width], lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths_q: list[int],
        lengths_k: list[int],
        causal: bool,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        ctx.empty = len(q) == 0 or len(k) == 0
        if ctx.empty:
            o, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
            ctx.save_for_backward(q, k, v)
        else:
            ends = torch.tensor([[0, *accumulate(n)] for n in (lengths_q, lengths_k)], dtype=torch.int32)
            cu_q, cu_k = ends.pin_memory().to(q.device, non_blocking=True)
            # (sequence bounds, longest sequences, dropout, causal): the middle of both ops' arguments
            ctx.shape = (max(lengths_q), max(lengths_k), 0.0, causal and window is None)
            ctx.options = {"scale": scale, "window_size_left": -1 if window is None else window - 1}
            ctx.options["window_size_right"] = 0 if causal else -1
            o, rows, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, cu_q, cu_k, *ctx.shape, return_debug_mask=False, **ctx.options
            )
            ctx.save_for_backward(q, k, v, o, rows, cu_q, cu_k)
            lse = rows.t()  # [H, Tq] -> [Tq, H]
            lse = lse.masked_fill(lse == torch.inf, -torch.inf)  # the kernel's mark of a query without keys
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        if ctx.empty:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), *(None,) * 5
        o, rows, cu_q, cu_k = rest
        # Without dropout the kernel reads neither random state; it wants the tensors all the same.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do.contiguous(), q, k, v, o, rows, cu_q, cu_k, *ctx.shape, state, unused, **ctx.options
        )
        return dq, dk, dv, *(None,) * 5
