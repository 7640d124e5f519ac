"""`lsys bench trace`: what the traces of `train.profile` say about communication and its overlap."""

import gzip
import json
import logging
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

Spans = list[tuple[float, float]]  # begin and end, us
CUT_OFF = (EOFError, zlib.error)  # a run that was killed while it wrote
CLOCKS_US = 50.0  # how much the clocks of lsys's operations and of the profiler's ranges may differ


class TraceError(ValueError):
    """A file that is no trace of lsys, or a missing extra."""


@dataclass(frozen=True)
class TraceOptions:
    """Summarise the traces that train.profile wrote: communication, its overlap with computation, time by range."""

    traces: Positional[list[Path]]
    """Files, or folders of them (train.folder/profile)."""
    hta: bool = False
    """GPU traces: also what HolisticTraceAnalysis says of them (extra `trace`)."""


@dataclass
class Axis:
    """Communication of one axis: operations, bytes sent, their spans, the spans for which a rank was blocked in them."""

    calls: int = 0
    bytes: int = 0
    spans: Spans = field(default_factory=list)
    blocked: Spans = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """What one trace says of its steps; a validation, checkpoint or report between them is left out.

    Attributes:
        name: the file's. steps: spans of the steps. axes: by name.
        kernels, nccl: spans of a GPU's kernels that compute, that communicate.
        ranges: us and calls of each kind of range, over all layers.
    """

    name: str
    steps: Spans
    axes: dict[str, Axis]
    kernels: Spans
    nccl: Spans
    ranges: dict[str, tuple[float, int]]

    @property
    def seconds(self) -> float:
        return length(self.steps) / 1e6

    @property
    def communication(self) -> float:
        """s in which any operation was under way."""
        spans = self.nccl or [span for axis in self.axes.values() for span in axis.spans]
        return length(union(spans)) / 1e6

    @property
    def exposed(self) -> float:
        """s of these in which nothing was computed."""
        if self.nccl:
            return (length(union(self.nccl)) - overlap(self.nccl, self.kernels)) / 1e6
        return length(union([span for axis in self.axes.values() for span in axis.blocked])) / 1e6


def main(options: TraceOptions) -> int:
    files = [file for path in options.traces for file in _files(path)]
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # rich would fold the tables of a log
    summaries = [summarise(file) for file in files]
    console.print(
        _overlap(summaries), *(table for summary in summaries for table in (_axes(summary), _ranges(summary)))
    )
    if options.hta:
        _holistic(files, console)
    return 0


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.json.gz")) if path.is_dir() else [path]
    if not found or not found[0].exists():
        raise TraceError(f"{path} has no trace (*.json.gz); train.profile.first and train.profile.steps make some")
    return found


def summarise(file: Path) -> Summary:
    """Raises TraceError: the file is no trace of a step."""
    try:
        with gzip.open(file, "rt") as text:
            events: list[dict[str, Any]] = json.load(text)["traceEvents"]
    except (*CUT_OFF, OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{file} is no trace that train.profile wrote ({error})") from None
    steps = [_span(e) for e in events if e.get("ph") == "X" and _is(e, "lsys.step ") and "dur" in e and _on_host(e)]
    if not steps:
        raise TraceError(f"{file} has no step of lsys; name a trace that train.profile wrote")
    # A GPU runs kernels some time after their issue: what came between two steps is not told from what came within.
    begin, end = min(steps)[0], max(end for _, end in steps)
    kernels = [e for e in events if e.get("cat") == "kernel" and begin <= e["ts"] <= end]
    nccl = [_span(e) for e in kernels if e["name"].startswith("nccl")]
    computing = [_span(e) for e in kernels if not e["name"].startswith("nccl")]
    return Summary(file.name, steps, _by_axis(events, steps), computing, nccl, _by_range(events, steps))


def _within(event: dict[str, Any], steps: Spans, slack: float = 0.0) -> bool:
    """Whether an event begins in a step."""
    return any(begin - slack <= event["ts"] <= end for begin, end in steps)


def _on_host(event: dict[str, Any]) -> bool:
    return event.get("cat") in ("user_annotation", "cpu_op")  # a GPU's copy of a range has another category


def _is(event: dict[str, Any], prefix: str) -> bool:
    return str(event.get("name", "")).startswith(prefix)


def _span(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _by_axis(events: Iterable[dict[str, Any]], steps: Spans) -> dict[str, Axis]:
    """Operations issued in a step, however late they end."""
    axes: dict[str, Axis] = defaultdict(Axis)
    begun: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") == "lsys.standing" and _within(event, steps, CLOCKS_US):
            axes[event["args"]["axis"]].blocked.append(_span(event))
        elif event.get("cat") == "lsys.communication" and event["ph"] == "b":
            begun[event["id"]] = event
        elif event.get("cat") == "lsys.communication" and event["ph"] == "e":
            first = begun.pop(event["id"])
            if not _within(first, steps, CLOCKS_US):
                continue
            axis = axes[first["args"]["axis"]]
            axis.calls, axis.bytes = axis.calls + 1, axis.bytes + first["args"]["bytes"]
            axis.spans.append((first["ts"], event["ts"]))
    return dict(axes)


def _by_range(events: Iterable[dict[str, Any]], steps: Spans) -> dict[str, tuple[float, int]]:
    """Those in a step; layers of one kind together."""
    sums: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.get("ph") == "X" and _is(event, "lsys.") and _on_host(event) and _within(event, steps):
            name = re.sub(r"^lsys\.(step|layer) \d+ ?", r"\1 ", event["name"]).removeprefix("lsys.").strip()
            us, calls = sums.get(name, (0.0, 0))
            sums[name] = us + event["dur"], calls + 1
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def union(spans: Sequence[tuple[float, float]]) -> Spans:
    """The same time, each moment once, in order."""
    joined: Spans = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in spans)


def overlap(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """How long both are."""
    return length(union(first)) + length(union(second)) - length(union([*first, *second]))


def _overlap(summaries: Sequence[Summary]) -> Table:
    table = Table(
        "trace", "steps", "ms of a step", "communication", "hidden by computation", "exposed", "of the step",
        title="communication and its overlap, ms of a step", title_justify="left",
    )  # fmt: skip
    for each in summaries:
        steps, under_way, exposed = len(each.steps), each.communication, each.exposed
        times = (each.seconds, under_way, under_way - exposed, exposed)
        table.add_row(
            each.name, str(steps), *(f"{1e3 * t / steps:,.2f}" for t in times), f"{100 * exposed / each.seconds:.1f}%"
        )
    return table


def _axes(summary: Summary) -> Table:
    table = Table(
        "axis", "calls", "MB", "ms under way", "ms blocked",
        title=f"{summary.name}: communication of a step by axis", title_justify="left",
    )  # fmt: skip
    steps = len(summary.steps)
    for name, axis in sorted(summary.axes.items()):
        times = (length(union(axis.spans)), length(union(axis.blocked)))
        table.add_row(
            name,
            f"{axis.calls / steps:,.0f}",
            f"{axis.bytes / steps / 1e6:,.3f}",
            *(f"{t / steps / 1e3:,.2f}" for t in times),
        )
    return table


def _ranges(summary: Summary) -> Table:
    table = Table(
        "range", "calls", "ms", title=f"{summary.name}: named ranges of a step, on the host", title_justify="left"
    )
    for name, (us, calls) in summary.ranges.items():
        table.add_row(name, f"{calls / len(summary.steps):,.0f}", f"{us / 1e3 / len(summary.steps):,.2f}")
    return table


def _holistic(files: Sequence[Path], console: Console) -> None:
    """HolisticTraceAnalysis reads the traces of a GPU, one for each rank."""
    try:
        from hta.trace_analysis import TraceAnalysis  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise TraceError("--hta needs HolisticTraceAnalysis: pip install 'lsys[trace]'") from None
    ranks = {int(match[1]): str(file) for file in files if (match := re.match(r"rank(\d+)-", file.name))}
    logging.getLogger("hta").setLevel(logging.ERROR)  # it tells of each step of its work
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas warns of the way in which it is called, with every number of a column
        analysis = TraceAnalysis(trace_files=ranks)
        console.print(analysis.get_temporal_breakdown(visualize=False).to_string())
        console.print(analysis.get_comm_comp_overlap(visualize=False).to_string())
