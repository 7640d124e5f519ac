"""The short causal convolution by the Triton kernels, differentiable, and who may take them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.short_convolution.neighbours import Neighbours, packed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 4  # W: the backward kernel's W x W reads are written out


def refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernels do not take them, in words that follow the backend's name; None: they do."""
    if x.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, not {x.dtype}"
    if weight.shape[1] > WIDEST:
        return f"takes up to {WIDEST} taps, not {weight.shape[1]}"
    if find_spec("triton") is None:
        return "needs Triton: pip install 'lsys[triton]'"
    if not x.is_cuda and not _is_interpreted():
        return "runs on CUDA, and on CPU only interpreted, with TRITON_INTERPRET=1 set before the start"
    return None


def _is_interpreted() -> bool:
    """What the kernels are, rather than what the environment says: that was read when they were imported."""
    from triton.runtime.jit import JITFunction

    from lsys.kernels.short_convolution.short_convolution_triton import convolution_kernel

    return not isinstance(convolution_kernel, JITFunction)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Sequence[int],
    initial: Tensor | None,
    activation: str | None,
) -> Tensor:
    """x [T, C], weight [C, W], bias [C], initial [N, W - 1, C] -> [T, C] in x's dtype."""
    near = packed(list(lengths), weight.shape[1], initial is not None).to(x.device)
    others = x.new_empty(0, x.shape[1]) if initial is None else initial.flatten(0, 1)
    y: Tensor = _Convolution.apply(x, others, weight, bias, near, activation)
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        others: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        near: Neighbours,
        activation: str | None,
    ) -> Tensor:
        from lsys.kernels.short_convolution.short_convolution_triton import forward

        x, others, bias = x.contiguous(), others.contiguous(), None if bias is None else bias.contiguous()
        ctx.near, ctx.activation = near, activation
        ctx.save_for_backward(x, others, weight, bias)
        return forward(x, others, weight.contiguous(), bias, near, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from lsys.kernels.short_convolution.short_convolution_triton import backward

        x, others, weight, bias = ctx.saved_tensors
        found = backward(x, others, weight.contiguous(), bias, ctx.near, ctx.activation, dy.contiguous())
        d_bias = None if bias is None else found.bias.to(bias.dtype)
        return found.x, found.kept.to(others.dtype), found.weight.to(weight.dtype), d_bias, None, None
