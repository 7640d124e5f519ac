"""Partial softmax results over disjoint sets of keys, merged."""

import torch
from torch import Tensor


def merge(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> None:
    """Turns attention over one set of keys into attention over its union with another, disjoint set, in place.

    lse' = log(e^lse + e^other_lse);  o' = o + e^(other_lse - lse') (other_o - o)

    Args:
        o, lse: [..., D] and [...] of one dtype, fp32 or fp64; o = 0 and lse = -inf where a query saw no key.
        other_o, other_lse: the same of the other set; other_o of any dtype.
    """
    merged = torch.logaddexp(lse, other_lse)
    finite = merged.masked_fill(merged == -torch.inf, 0)  # no keys in either: the weight is e^-inf, not e^nan
    o.lerp_(other_o.to(o.dtype), (other_lse - finite).exp().unsqueeze(-1))
    lse.copy_(merged)
