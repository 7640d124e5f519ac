"""How a state goes over a segment, S -> A S + B: the four forms of A, and what is asked of them.

    None          1: without decay
    [..., H]      e^a for all of a head's state
    [..., H, K]   e^a for each key channel, a row of the state
    [..., H, K, K]  a matrix: the delta rule

The first three are given by their logarithms, which are at most 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.checks import without_autocast

MATRIX = 4  # dimensions of a transition [n, H, K, K]


def is_matrix(transition: Tensor | None) -> bool:
    return transition is not None and transition.dim() == MATRIX


def operator(transition: Tensor) -> Tensor:
    """A, to be given to `act`: [n, H, 1, 1], [n, H, K, 1] or [n, H, K, K]."""
    if is_matrix(transition):
        return transition
    decay = transition.exp()
    return decay[..., None, None] if decay.dim() == 2 else decay[..., None]


def act(a: Tensor, state: Tensor) -> Tensor:
    """A S, of A as `operator` gives it: a column is a diagonal."""
    return a * state if a.shape[-1] == 1 else _Product.apply(a, state)


def transposed(a: Tensor) -> Tensor:
    """A^T: what takes the gradient after to that before."""
    return a if a.shape[-1] == 1 else a.mT


def carry(transition: Tensor | None, state: Tensor) -> Tensor:
    """A S: [n, H, K, V] -> [n, H, K, V]. Either may have one row for all n."""
    return state if transition is None else act(operator(transition), state)


def gradient(transition: Tensor, d_state: Tensor, before: Tensor) -> Tensor:
    """The gradient of the transition, from that of the state after it and the state before it, in the transition's shape."""
    if is_matrix(transition):
        return d_state @ before.mT
    if transition.dim() == 2:  # <D, S> of states: [n, H, K, V] twice -> [n, H]
        inner = (d_state.flatten(2).unsqueeze(2) @ before.flatten(2).unsqueeze(3))[..., 0, 0]
    else:
        inner = (d_state * before).sum(-1)  # [n, H, K]
    return transition.exp() * inner


def then(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The transition over a segment and the one after it."""
    if first is None or second is None:
        return None
    return _Product.apply(second, first) if is_matrix(first) else first + second


def identity(like: Tensor, rows: int) -> Tensor:
    """The transition over nothing, in the form of `like`."""
    if is_matrix(like):
        return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(rows, *like.shape[1:])
    return like.new_zeros(rows, *like.shape[1:])


class _Product(torch.autograd.Function):
    """A product of matrices whose gradients, too, are made without autocast."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        d_left = (d_product @ right.mT).sum_to_size(left.shape) if ctx.needs_input_grad[0] else None
        return d_left, (left.mT @ d_product).sum_to_size(right.shape) if ctx.needs_input_grad[1] else None
