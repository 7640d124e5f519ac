"""`lsys bench trace` tells of steps, not of what comes between them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lsys.bench.trace import TraceError, summarise


def slice_(name: str, begin: int, end: int, category: str = "user_annotation", **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "pid": 0, "tid": 1, **more}


def operation(number: int, begin: int, end: int) -> list[dict[str, Any]]:
    """Under way from begin to end, waited for from its middle."""
    common = {"cat": "lsys.communication", "name": "context all_gather", "id": number, "pid": 0, "tid": 2}
    about = {"axis": "context", "bytes": 1000}
    blocked = slice_("context all_gather", (begin + end) // 2, end, "lsys.standing", args=about)
    return [{**common, "ph": "b", "ts": begin, "args": about}, {**common, "ph": "e", "ts": end, "args": {}}, blocked]


def test_what_comes_between_steps_is_left_out(tmp_path: Path):
    events = [
        slice_("lsys.clock", -20, -10),
        *(slice_(f"lsys.step {n}", begin, begin + 1000) for n, begin in ((4, 0), (5, 9000))),
        *(slice_("lsys.layer 1 MLP", begin, begin + 100) for begin in (200, 4200, 9200)),
        *operation(0, 400, 600),
        *operation(1, 2000, 8000),  # of a validation
        *operation(2, 9400, 9600),
    ]
    path = tmp_path / "rank0-step4.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    summary = summarise(path)
    axis = summary.axes["context"]
    assert summary.seconds == pytest.approx(2e-3) and summary.steps == [(0, 1000), (9000, 10000)]
    assert (axis.calls, axis.bytes) == (2, 2000) and axis.spans == [(400, 600), (9400, 9600)]
    assert summary.communication == pytest.approx(4e-4) and summary.exposed == pytest.approx(2e-4)
    assert summary.ranges == {"step": (2000, 2), "layer MLP": (200, 2)}


def test_kernels_before_the_first_step_and_after_the_last_are_left_out(tmp_path: Path):
    kernels = [(-500, -400), (100, 300), (1200, 1400), (5000, 6000)]
    events = [slice_("lsys.step 4", 0, 1000), slice_("lsys.step 5", 1500, 2500)]
    events += [slice_("ncclDevKernel_AllGather", *span, "kernel") for span in kernels]
    path = tmp_path / "rank0-step4.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert summarise(path).nccl == [(100, 300), (1200, 1400)]


def test_a_trace_that_was_cut_off_is_told(tmp_path: Path):
    path = tmp_path / "rank0-step4.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [slice_("lsys.step 4", 0, 1000)] * 50}).encode())[:-12])
    with pytest.raises(TraceError, match="is no trace that train.profile wrote"):
        summarise(path)
