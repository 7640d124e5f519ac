"""Partial softmax results over disjoint sets of keys, merged."""

import torch
from torch import Tensor


def merge(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    lse' = log(e^lse + e^other_lse);  o' = e^(lse - lse') o + e^(other_lse - lse') other_o

    Args:
        o, other_o: [T, H, D].
        lse, other_lse: [T, H], fp32 or fp64; -inf where a query saw no key.

    Returns:
        (o', lse') in the dtype of `lse`.
    """
    merged = torch.logaddexp(lse, other_lse)
    finite = merged.masked_fill(merged == -torch.inf, 0)  # no keys in either: both weights are e^-inf, not e^nan
    weight, other_weight = (lse - finite).exp().unsqueeze(-1), (other_lse - finite).exp().unsqueeze(-1)
    return o.to(merged.dtype) * weight + other_o.to(merged.dtype) * other_weight, merged
