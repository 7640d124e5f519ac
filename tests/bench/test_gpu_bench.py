"""The command for a GPU machine, without a GPU: its script runs, and reports what goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = "linear attention, gated delta, pack"


def gpu(folder, *words):
    """The command's exit status, what it wrote, and what it said."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--smoke", "--out", str(folder), *words]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (folder / "smoke.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "smoke.json").read_text()), done.stdout + done.stderr


@pytest.mark.slow
def test_a_wrong_result_is_reported_and_the_rest_goes_on(tmp_path):
    pytest.importorskip("triton")
    status, sections, said = gpu(tmp_path, "--section", "correct", "speed", "--fault", PLANTED, "--minutes", "12")
    assert status == 1, said
    failed = [case for case in sections["correct"] if case["status"] == "failed"]
    assert [case["name"].startswith(PLANTED) for case in failed] == [True], failed
    assert failed[0]["error"] == "wrong: o"
    kinds = {(case["family"], case["kind"]) for case in sections["correct"] if case["status"] == "passed"}
    assert {("linear", kind) for kind in ("pack", "phases", "batch", "causality")} <= kinds
    assert {(family, "causality") for family in ("softmax", "convolution")} <= kinds
    assert [case["status"] for case in sections["speed"]] == ["measured"] * 2, said
    text = (tmp_path / "smoke.md").read_text()
    assert "numbers mean nothing" in text and "| wrong: o |" in text
    assert not (tmp_path / "gpu.json").exists()  # where figures of a GPU go


def test_without_failures_the_status_is_zero(tmp_path):
    pytest.importorskip("triton")
    status, sections, said = gpu(tmp_path, "--section", "environment")
    assert status == 0, said
    assert "torch" in sections["environment"][0]["found"]


@pytest.fixture
def children(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.gpu_parts import child

    return child


CASES = """
import os, time
def run(case):
    if case["name"] == "raises":
        raise ValueError("no such thing")
    if case["name"] == "dies":
        print("last words", flush=True)
        os._exit(7)
    if case["name"] == "hangs":
        time.sleep(60)
    return {"status": "passed"}
"""


def outcomes(children, folder, names, **options):
    (folder / "planted_cases.py").write_text(CASES)
    found: list[dict[str, Any]] = []
    environment = os.environ | {"PYTHONPATH": str(folder)}
    options = dict(environment=environment, deadline=time.monotonic() + 120) | options
    children.run_groups("planted_cases", [[{"name": name} for name in names]], found.append, **options)
    return [(case["name"], case["status"], case.get("error", "")) for case in found]


def test_a_case_that_ends_its_process_costs_itself_alone(children, tmp_path):
    found = outcomes(children, tmp_path, ["fine", "raises", "dies", "fine", "hangs", "fine"], limit=5.0)
    assert [(name, status) for name, status, _ in found] == [
        ("fine", "passed"), ("raises", "failed"), ("dies", "failed"), ("fine", "passed"), ("hangs", "failed"), ("fine", "passed"),
    ]  # fmt: skip
    assert found[1][2].endswith("ValueError: no such thing")
    assert found[2][2] == "exit status 7: last words"
    assert found[4][2] == "no result after 5 s"


def test_what_time_does_not_allow_is_skipped(children, tmp_path):
    found = outcomes(children, tmp_path, ["hangs", "fine"], deadline=time.monotonic() + 2)
    assert found == [("hangs", "skipped", "out of time"), ("fine", "skipped", "out of time")]


def test_tables_of_cases_without_figures(children):
    from bench.gpu_parts import report

    lost = {"name": "token, 8K tokens", "family": "linear", "status": "failed", "error": "a | b\nc"}
    text = report.markdown({"speed": [lost], "train": [], "correct": [lost], "environment": [lost]}, False)
    assert "| token, 8K tokens | not measured |" in text and "| a / b c |" in text
