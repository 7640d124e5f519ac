"""Rows of a tensor that several tiles own: a slice if they are back to back, else an index tensor, int64."""

from itertools import pairwise

import torch
from torch import Tensor

Rows = slice | Tensor


def rows_of(spans: list[slice], device: torch.device) -> Rows:
    """The rows of all spans, one span after the other."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    starts, stops = torch.tensor([(span.start, span.stop) for span in spans]).unbind(1)
    lengths = stops - starts
    shifts = stops - lengths.cumsum(0)  # of each span, from its place among the rows to its place in the tensor
    shifts = shifts.repeat_interleave(lengths)
    return move(torch.arange(len(shifts)) + shifts, device)


def move(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def take(x: Tensor, rows: Rows) -> Tensor:
    """x[rows]; a view if they are a slice, else a copy."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def put(x: Tensor, rows: Rows, part: Tensor) -> None:
    """x[rows] = part, each row once."""
    if isinstance(rows, slice):
        x[rows] = part
    else:
        x.index_copy_(0, rows, part.to(x.dtype))


def add(x: Tensor, rows: Rows, part: Tensor) -> None:
    """x[rows] += part, where rows may repeat."""
    if isinstance(rows, slice):
        x[rows] += part
    else:
        x.index_add_(0, rows, part.to(x.dtype))
