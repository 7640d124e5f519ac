"""How packed segments are cut for the Triton kernels: in spans of several chunks, each one program a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lsys.kernels.linear_attention.scan import ScanPlan

SPAN_CHUNKS = 16  # the least: a span's state is K x V elements, so few tokens a span would make many bytes of states
PROGRAMS = 512  # spans x heads that keep a GPU busy: beyond, longer spans make the scan over them shorter


@dataclass(frozen=True)
class Spans:
    """Some of the spans. A span is a run of tokens of one segment, from a multiple of the span's size in it.

    Attributes:
        table: int32 [m, 4]: first token, tokens, first chunk (of these spans' chunks), row of its state (-1: zero).
        chunks: int32 [n, 2]: first token, tokens.
        whole: whether every token is in one.
    """

    table: Tensor
    chunks: Tensor
    whole: bool

    def __len__(self) -> int:
        return len(self.table)


@dataclass(frozen=True)
class Division:
    """All spans of packed segments, and which of them need states.

    A segment is *scanned* if it has several spans or external state; the others start from zero and end in nothing.

    Attributes:
        every: all spans; their rows are those among the scanned ones.
        scanned: the spans of scanned segments.
        plan: of the scan over these.
        external: the spans of segments with external state, and `external_plan` of the scan over them.
        external_rows: these among the scanned spans, int64; None if they are all of them.
        external_segments: the segments with external state among the scanned ones, int64; None if they are all of them.
        entry: of each span of a segment with external state, the number of that segment (0 to L - 1), int64.
    """

    every: Spans
    scanned: Spans
    plan: ScanPlan
    external: Spans
    external_plan: ScanPlan
    external_rows: Tensor | None
    external_segments: Tensor | None
    entry: Tensor


def span_chunks(lengths: Sequence[int], chunk: int, heads: int) -> int:
    """Chunks of a span, so that spans are enough to fill a GPU but no more."""
    chunks = sum(-(-length // chunk) for length in lengths)
    return max(SPAN_CHUNKS, -(-chunks * heads // PROGRAMS))


@lru_cache(maxsize=16)  # the layers of a model ask alike
def divide(
    lengths: tuple[int, ...], external: tuple[int, ...], chunk: int, span: int, device: torch.device
) -> Division:
    """Segments of `lengths` tokens, of which `external` send or receive states, in spans of `span` chunks of `chunk` tokens."""
    length = torch.tensor(lengths, dtype=torch.int64)
    counts = -(-length // (span * chunk))  # spans of each segment
    segment = torch.repeat_interleave(torch.arange(len(lengths)), counts)  # of each span
    begin = (torch.arange(len(segment)) - (counts.cumsum(0) - counts)[segment]) * (span * chunk)  # in its segment
    first = (length.cumsum(0) - length)[segment] + begin
    tokens = (length[segment] - begin).clamp(max=span * chunk)

    external_segments = torch.tensor(external, dtype=torch.int64)
    is_external = torch.zeros(len(lengths), dtype=torch.bool)
    is_external[external_segments] = True
    is_scanned = is_external | (counts > 1)
    scanned_span, external_span = is_scanned[segment], is_external[segment]
    row = torch.where(scanned_span, scanned_span.cumsum(0) - 1, -1)
    number = is_external.cumsum(0) - 1  # of a segment among the external ones, which ascend

    def spans(mask: Tensor, rows: Tensor | None = None) -> Spans:
        at, size = first[mask], tokens[mask]
        chunks = -(-size // chunk)
        before = chunks.cumsum(0) - chunks
        rows = torch.arange(len(at)) if rows is None else rows
        table = torch.stack([at, size, before, rows], dim=1)
        span_of = torch.repeat_interleave(torch.arange(len(at)), chunks)
        offset = (torch.arange(len(span_of)) - before[span_of]) * chunk
        bounds = torch.stack([at[span_of] + offset, (size[span_of] - offset).clamp(max=chunk)], dim=1)
        return Spans(table.int().to(device), bounds.int().to(device), bool(mask.all()))

    alike = bool((is_external == is_scanned).all())
    scanned = spans(scanned_span)
    plan = ScanPlan(tuple(counts[is_scanned].tolist()), device)
    return Division(
        every=spans(torch.ones_like(scanned_span), row),
        scanned=scanned,
        plan=plan,
        external=scanned if alike else spans(external_span),
        external_plan=plan if alike else ScanPlan(tuple(counts[is_external].tolist()), device),
        external_rows=None if alike else row[external_span].to(device),
        external_segments=None if alike else (is_scanned.cumsum(0) - 1)[is_external].to(device),
        entry=number[segment[external_span]].to(device),
    )
