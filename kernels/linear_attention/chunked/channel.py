"""Chunks with a decay for each token and key channel (GLA).

The score sum_c q_ic k_jc e^(b_ic - b_jc) is no product of a function of i and one of j with exponents of at most 0, unless
some place m lies between: then it is (q_i e^(b_i - b_m)) . (k_j e^(b_m - b_j)). So a chunk is halved: at each level, the
right half of every span meets its left half at the border in one matrix product, down to spans of a few tokens, which are
done a diagonal at a time. Sums of log-decays are made from the bottom up and never subtracted, so they lose no digits.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.chunked.chunks import ChunkDecay, Chunks, matmul, repeat_heads

SMALLEST = 4  # tokens of the smallest span


class ChannelDecay:
    """Decays of channels within chunks, from log_decay [n, H, C, K], zero where there is no token."""

    def __init__(self, log_decay: Tensor) -> None:
        self.log_decay = log_decay
        self.upto, self.after = _Sums.apply(log_decay)

    @property
    def total(self) -> Tensor:
        return self.upto[:, :, -1].clone()  # a view would keep all of the sums wherever this is kept

    def from_start(self, x: Tensor) -> Tensor:
        return x * self.upto.exp()

    def to_end(self, x: Tensor) -> Tensor:
        return x * self.after.exp()

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        return _Scores.apply(repeat_heads(q, group), repeat_heads(k, group), self.log_decay)


class ChannelChunks(Chunks):
    """log_decay [T, H, K]."""

    @cached_property
    def decay(self) -> ChunkDecay:
        assert self.log_decay is not None
        return ChannelDecay(self.grid.cut(self.log_decay, self.dtype))


class _Sums(torch.autograd.Function):
    """Log-decays [n, H, C, K] -> their sums from the chunk's first token up to each, and from the one after it to the last."""

    @staticmethod
    def forward(ctx: Any, log_decay: Tensor) -> tuple[Tensor, Tensor]:
        upto, after = log_decay.clone(), torch.zeros_like(log_decay)
        for size in _sizes(1, log_decay.shape[2]):
            _lift(upto, after, size)
        return upto, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_upto: Tensor, d_after: Tensor) -> Tensor:
        d_upto, d_after = (x.clone(memory_format=torch.contiguous_format) for x in (d_upto, d_after))
        for size in reversed(_sizes(1, d_upto.shape[2])):
            _lower(d_upto, d_after, size)
        return d_upto


class _Scores(torch.autograd.Function):
    """q_i . e^(b_i - b_j) k_j for j <= i, else 0: [n, H, C, K] three times -> [n, H, C, C].

    Autograd would fill a whole tensor for each half and each diagonal that is taken.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
        scores = q.new_zeros(*q.shape[:3], q.shape[2])
        smallest = min(SMALLEST, q.shape[2])
        _diagonals(scores, q, k, log_decay, smallest)
        upto, after = log_decay.clone(), torch.zeros_like(log_decay)
        for size in _sizes(1, smallest):
            _lift(upto, after, size)
        decays = []
        for size in _sizes(smallest, q.shape[2]):
            entry, exit = _right(upto, size).exp(), _left(after, size).exp()
            corner = matmul(_right(q, size) * entry, (_left(k, size) * exit).mT)
            _corner(scores, size).copy_(corner)
            decays += [entry, exit]
            _lift(upto, after, size)
        ctx.save_for_backward(q, k, log_decay, *decays)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, log_decay, *decays = ctx.saved_tensors
        chunk, smallest = q.shape[2], min(SMALLEST, q.shape[2])
        dq, dk, d_near = _diagonals_backward(d_scores, q, k, log_decay, smallest)
        d_upto, d_after = torch.zeros_like(q), torch.zeros_like(q)
        for size in reversed(_sizes(smallest, chunk)):
            if 2 * size < chunk:
                _lower(d_upto, d_after, size)
            exit, entry = decays.pop(), decays.pop()
            late, early, d_corner = _right(q, size), _left(k, size), _corner(d_scores, size).contiguous()
            d_late = matmul(d_corner, early * exit).mul_(entry)
            d_early = matmul(d_corner.mT, late * entry).mul_(exit)
            _right(dq, size).add_(d_late)
            _left(dk, size).add_(d_early)
            _right(d_upto, size).addcmul_(d_late, late)  # of e^b q, the gradient of q times q is that of b
            _left(d_after, size).addcmul_(d_early, early)
        for size in reversed(_sizes(1, smallest)):
            _lower(d_upto, d_after, size)
        return dq, dk, d_upto.add_(d_near)


def _sizes(first: int, last: int) -> list[int]:
    """first, 2 first, ..., last / 2."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return sizes


def _left(x: Tensor, size: int) -> Tensor:
    """The left halves of spans of 2 `size` tokens of [n, H, C, K]: [n H, spans, size, K]."""
    return _halves(x, size)[:, :, 0]


def _right(x: Tensor, size: int) -> Tensor:
    """The right halves."""
    return _halves(x, size)[:, :, 1]


def _halves(x: Tensor, size: int) -> Tensor:
    return x.view(x.shape[0] * x.shape[1], x.shape[2] // (2 * size), 2, size, x.shape[3])


def _spans(scores: Tensor, size: int) -> Tensor:
    """What spans of `size` tokens of [n, H, C, C] have with themselves: [n H, spans, size, size]."""
    many = scores.shape[2] // size
    x = scores.view(scores.shape[0] * scores.shape[1], many, size, many, size)
    return x.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _corner(scores: Tensor, size: int) -> Tensor:
    """What right halves have with left halves: [n H, spans, size, size]."""
    return _spans(scores, 2 * size)[..., size:, :size]


def _lift(upto: Tensor, after: Tensor, size: int) -> None:
    """From sums in spans of `size` tokens to sums in spans of twice as many, in place."""
    _left(after, size).add_(_right(upto, size)[..., -1:, :])
    _right(upto, size).add_(_left(upto, size)[..., -1:, :])


def _lower(d_upto: Tensor, d_after: Tensor, size: int) -> None:
    """The adjoint of `_lift`."""
    _left(d_upto, size)[..., -1:, :] += _right(d_upto, size).sum(-2, keepdim=True)
    _right(d_upto, size)[..., -1:, :] += _left(d_after, size).sum(-2, keepdim=True)


def _between(log_decay: Tensor, smallest: int) -> list[Tensor]:
    """By distance, the sums of log-decays from token i - distance, which does not count, to i: [n H spans, size - distance, K]."""
    g = log_decay.view(-1, smallest, log_decay.shape[3])
    sums = [torch.zeros_like(g)]
    for distance in range(1, smallest):
        sums.append(sums[-1][:, 1:] + g[:, 1 : smallest - distance + 1])
    return sums


def _diagonals(scores: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, smallest: int) -> None:
    """Fill in the scores in the smallest spans."""
    near, width = _spans(scores, smallest), q.shape[3]
    q, k = q.view(-1, smallest, width), k.view(-1, smallest, width)
    for distance, between in enumerate(_between(log_decay, smallest)):
        x = between.exp().mul_(q[:, distance:]).mul_(k[:, : smallest - distance]).sum(-1)
        near.diagonal(-distance, -2, -1).copy_(x.view(*near.shape[:2], smallest - distance))


def _diagonals_backward(
    d_scores: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, smallest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and the log-decays, from the smallest spans alone."""
    near, shape = _spans(d_scores, smallest), q.shape
    q, k = q.view(-1, smallest, shape[3]), k.view(-1, smallest, shape[3])
    dq, dk, d_decay = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(q)
    d_between: Tensor | None = None
    for distance, between in reversed(list(enumerate(_between(log_decay, smallest)))):
        last = smallest - distance
        weight = between.exp().mul_(near.diagonal(-distance, -2, -1).reshape(-1, last, 1))
        dk[:, :last].addcmul_(weight, q[:, distance:])
        d_late = weight.mul_(k[:, :last])
        dq[:, distance:] += d_late
        if distance:
            d_sum = d_late.mul_(q[:, distance:])
            if d_between is not None:
                d_sum[:, 1:] += d_between
            d_decay[:, 1 : last + 1] += d_sum
            d_between = d_sum
    return dq.view(shape), dk.view(shape), d_decay.view(shape)
