"""Rows of a tensor that several tiles own: a slice if they are back to back, else an index tensor, int64."""

from collections.abc import Iterator

import torch
from torch import Tensor

Rows = slice | Tensor


def rows_of(begin: Tensor, number: Tensor, bounds: Tensor, device: torch.device) -> list[Rows]:
    """Rows of each batch's spans, one span after the other.

    Args:
        begin, number: first row of each span and how many there are, int64 [spans].
        bounds: batch b is the spans bounds[b] to bounds[b + 1], one at least: int64 [batches + 1].
        device: where the index tensors are wanted.
    """
    end, firsts = begin + number, bounds[:-1]
    apart = torch.zeros_like(begin)
    apart[1:] = begin[1:] != end[:-1]
    apart[firsts] = 0
    gaps, places = (torch.nn.functional.pad(x.cumsum(0), (1, 0))[bounds].diff() for x in (apart, number))
    scattered = gaps > 0
    views: Iterator[Tensor] = iter(())
    if scattered.any():
        spans = scattered.repeat_interleave(bounds.diff()).nonzero().flatten()
        lengths = number[spans]
        shift = (end[spans] - lengths.cumsum(0)).repeat_interleave(lengths)  # from the place among all rows to the row
        views = iter(move(shift.add_(torch.arange(len(shift))), device).split(places[scattered].tolist()))
    edges = zip(begin[firsts].tolist(), end[bounds[1:] - 1].tolist(), scattered.tolist(), strict=True)
    return [next(views) if is_scattered else slice(first, stop) for first, stop, is_scattered in edges]


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
