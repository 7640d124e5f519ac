"""Sums of log-decays that lose no digits where some tokens forget everything and others next to nothing."""

import torch
from torch import Tensor

# Log-decays below count as this one: their exponential is zero in fp32 and in fp64.
LEAST = {torch.float32: -104.0, torch.float64: -746.0}


def bounded(log_decay: Tensor) -> Tensor:
    """Log-decays of which none is below LEAST, in their shape; those that were have the gradient zero, as e^g has."""
    return log_decay.clamp(min=LEAST[log_decay.dtype])


def running(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The sums b along the last dimension up to each token, in the dtype, and what rounding has taken from them.

    Differences of b are wrong by what has been rounded off: 6e-8 of a sum may be much of a mild decay behind a strong one. Exact are
    (b_i - b_j) + (rest_i - rest_j). The rest has no gradient: b has all of it.
    """
    exact = bounded(log_decay).double().cumsum(-1)
    b = exact.to(log_decay.dtype)
    return b, (exact.detach() - b.detach()).to(log_decay.dtype)
