"""Which rows a token's sum takes, and which sums take a row: what the Triton kernels are told of sequences. A function of lengths alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Neighbours(NamedTuple):
    """The neighbours of T tokens and of R rows that came from elsewhere, which are numbered behind them.

    Attributes:
        behind: int32 [T, W - 1]: row j before a token in its sequence, in column j - 1; -1: there is none.
        ahead: int32 [T + R, W - 1]: the token j after a row in its sequence, in column j - 1; -1: it is not among the T.
        kept: int32 [T + R]: where the row's gradient is wanted in fp32, its place among those; -1: it is wanted in x's dtype alone.
        places: how many are wanted in fp32.
    """

    behind: Tensor
    ahead: Tensor
    kept: Tensor
    places: int

    def to(self, device: torch.device) -> Neighbours:
        return self._replace(**{name: getattr(self, name).to(device) for name in ("behind", "ahead", "kept")})


def neighbours(
    source: Tensor, own: Tensor, begin: Tensor, others: int, width: int, sent: Tensor | None = None
) -> Neighbours:
    """The tables, on the host.

    Args:
        source: int64 [E], of sequences with what came before them, row after row: which of the T + R rows it is; -1: zeros.
        own: int64 [T], where among these the tokens are, in their order.
        begin: int64 [T], where among these each token's sequence begins.
        others: R. width: W.
        sent: int64, which tokens' gradients are wanted in fp32, ascending; all R others' always are, behind these.
    """
    tokens, reach = len(own), width - 1
    places = own[:, None] - torch.arange(1, width)  # [T, W - 1]
    behind = torch.where(places >= begin[:, None], source[places.clamp(min=0)] if len(source) else places, -1)
    ahead = torch.full((tokens + others, reach), -1, dtype=torch.int64)
    token, column = (behind >= 0).nonzero(as_tuple=True)
    ahead[behind[token, column], column] = token
    kept = torch.full((tokens + others,), -1, dtype=torch.int64)
    fixed = torch.cat(
        [torch.empty(0, dtype=torch.int64) if sent is None else sent, torch.arange(tokens, tokens + others)]
    )
    kept[fixed] = torch.arange(len(fixed))
    return Neighbours(behind.int(), ahead.int(), kept.int(), len(fixed))


def packed(lengths: list[int], width: int, has_initial: bool) -> Neighbours:
    """The tables of packed sequences on one device; the W - 1 inputs before each come from elsewhere, if there are any."""
    length, reach = torch.tensor(lengths, dtype=torch.int64), width - 1
    tokens, count = int(length.sum()), len(lengths)
    first = length.cumsum(0) - length  # the first token of each
    start = first + reach * torch.arange(1, count + 1)  # in the extended rows, where its own begin
    sequence = torch.arange(count).repeat_interleave(length)
    own = torch.arange(tokens) + reach * (sequence + 1)
    source = torch.full((tokens + reach * count,), -1, dtype=torch.int64)
    source[own] = torch.arange(tokens)
    others = reach * count if has_initial else 0
    if others:
        halo = (start[:, None] - reach + torch.arange(reach)).flatten()
        source[halo] = tokens + torch.arange(others)
    return neighbours(source, own, (start - reach)[sequence], others, width)
