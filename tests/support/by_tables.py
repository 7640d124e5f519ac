"""The short convolution as its kernels' tables say, in plain PyTorch: what ranks can run where Triton is not interpreted."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.kernels.short_convolution import fused
from lsys.kernels.short_convolution.neighbours import Neighbours


def forward(
    x: Tensor, others: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbours, activation: str | None
) -> Tensor:
    return _sums(torch.cat([x, others]).double(), weight.double(), bias, near, activation).to(x.dtype)


def _sums(rows: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbours, activation: str | None) -> Tensor:
    tokens = len(near.behind)
    seen = torch.cat([torch.arange(tokens)[:, None], near.behind.long()], dim=1)  # [T, W], -1: the row of zeros
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    y = torch.einsum("twc,cw->tc", padded[seen], weight.flip(1))
    y = y if bias is None else y + bias
    return F.silu(y) if activation else y


def backward(*arguments: Any) -> Any:
    from lsys.kernels.short_convolution.short_convolution_triton import Gradients

    x, others, weight, bias, near, activation, dy = arguments
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    rows, w, b = (each.double().detach().requires_grad_() for each in (torch.cat([x, others]), weight, bias))
    with torch.enable_grad():
        y = _sums(rows, w, b, near, activation)
    d_rows, d_weight, d_bias = torch.autograd.grad(y, (rows, w, b), dy.double())
    wanted = near.kept >= 0
    kept = torch.empty(near.places, x.shape[1])
    kept[near.kept[wanted].long()] = d_rows[wanted].float()
    return Gradients(d_rows[: len(x)].to(x.dtype), kept, d_weight.float(), d_bias.float())


@contextlib.contextmanager
def by_tables() -> Iterator[None]:
    """Inside, the kernels are these, and take tensors of the CPU."""
    from lsys.kernels.short_convolution import short_convolution_triton as kernels

    with (
        mock.patch.object(fused, "refusal", lambda x, weight: None),
        mock.patch.object(kernels, "forward", forward),
        mock.patch.object(kernels, "backward", backward),
    ):
        yield
