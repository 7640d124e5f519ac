"""Planted faults: kinds, places that still exist, and what is no fault of the code."""

import ast
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as path:  # bench is no installed package
    path.syspath_prepend(str(ROOT))
    from bench.mutation_parts.copies import Outcome, Place, changed
    from bench.mutation_parts.known import KNOWN
    from bench.mutation_parts.near import in_order, module_of
    from bench.mutation_parts.operators import Mutant, mutants
    from bench.mutation_parts.page import REASONS, page
    from bench.mutation_parts.together import together
    from bench.mutation_parts.verdicts import Judged, Verdict
    from bench.mutations import SOURCES, _judge_again, drawn, package_of

TEXT = '''
"""A text with - signs, 3 numbers and max(1, 2) in words."""
from typing import Any


def mean(x: "list[1]", *, least: int = 3, group: Any = None) -> float:
    """Half, 2 or 3."""
    if group is not None:
        dist.all_reduce(x, group=group.tp)
    if len(x) < least:
        raise ValueError(f"{len(x)} is below {least + 1}")
    kept[x] = 0.5 * x.sum(dim=1) + bias
    return cached if x in kept else -total
'''


def faults() -> dict[str, set[str]]:
    """By kind, the lines that faults make of TEXT's."""
    found: dict[str, set[str]] = {}
    for mutant in mutants("x.py", TEXT):
        text = mutant.of(TEXT)
        ast.parse(text)
        (line,) = set(text.splitlines()) - set(TEXT.splitlines()) or {""}
        found.setdefault(mutant.kind, set()).add(line.strip())
    return found


def test_faults_are_those_that_programmers_make() -> None:
    found = faults()
    assert {"return cached if x in kept else (total)", "kept[x] = (0.5 * x.sum(dim=1) - bias)"} == found["sign"]
    assert "kept[x] = (0.5 * x.sum(dim=1)) + bias" not in found["dropped term"]
    assert {"kept[x] = (0.5 * x.sum(dim=1))", "kept[x] = (0.5) + bias"} <= found["dropped term"]
    assert {"kept[x] = (2 * (0.5 * x.sum(dim=1))) + bias", "kept[x] = 1.0 * x.sum(dim=1) + bias"} == found["factor 2"]
    assert found["wrong axis"] == {"kept[x] = 0.5 * (x.sum(dim=0)) + bias"}
    assert found["wrong group"] == {"dist.all_reduce(x, group=group.cp)", "(dist.all_reduce(x))"}
    assert found["missing reduction"] == {"pass"} and found["swallowed error"] == {"pass"}
    assert found["stale cache"] == {"return (-total if x in kept else cached)"}
    assert "if (len(x) <= least):" in found["off by one"]
    assert 'def mean(x: "list[1]", *, least: int = 4, group: Any = None) -> float:' in found["off by one"]


def test_text_and_types_are_no_code() -> None:
    lines = {mutant.line for mutant in mutants("x.py", TEXT)}
    assert not lines & {2, 3, 7} and all('"""' not in mutant.old for mutant in mutants("x.py", TEXT))
    assert "torch.context" not in str([*mutants("x.py", "torch.tensor(1) + mesh.tensor")])
    assert all(mutant.kind == "swallowed error" for mutant in mutants("x.py", TEXT) if "raise" in mutant.old)


def test_a_fault_is_where_it_was_drawn() -> None:
    text = "é = 'ü' if a < b else 'ä'\n"  # columns are bytes of UTF-8
    assert {m.of(text) for m in mutants("x.py", text) if m.kind == "off by one"} == {"é = 'ü' if (a <= b) else 'ä'\n"}
    with pytest.raises(AssertionError, match="not there any more"):
        Mutant("x.py", 1, "sign", "a < c", "c", 9).of(text)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known_faults_have_their_place(known: object) -> None:
    for change in known.changes:  # type: ignore[attr-defined]
        text = (ROOT / change.file).read_text()
        assert text.count(change.old) == 1 and change.old != change.new
        ast.parse(text.replace(change.old, change.new))


def test_faults_are_drawn_by_seed_in_proportion_to_lines() -> None:
    one, again, other = (drawn(seed, 130) for seed in (1, 1, 2))
    assert one == again and one != other
    assert sum(number for number, _ in one.values()) == 130
    lines: dict[str, int] = {}
    for path in (path for name in SOURCES for path in (ROOT / name).rglob("*.py")):
        file = str(path.relative_to(ROOT))
        lines[package_of(file)] = lines.get(package_of(file), 0) + len(path.read_text().splitlines())
    for name, (number, order) in one.items():
        assert abs(number - 130 * lines[name] / sum(lines.values())) <= 1
        assert len({mutant.kind for mutant in order[:number]}) >= min(number, 4)


def test_the_nearest_tests_come_first() -> None:
    order = in_order(ROOT, "lsys/data/cursor.py")
    assert order[0] == "tests/data/test_cursor.py" and len(order) == len(set(order)) > 100
    assert "tests/bench/test_mutations.py" not in order
    assert module_of("parallel/attention/__init__.py") == "lsys.parallel.attention"


def test_the_page_counts_and_names_what_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REASONS, "a.py: -w -> w", "Nothing changes: w is 0")
    verdicts = [
        Verdict("a.py:1 sign", "lsys/data", "-x", "x", "caught", "tests/data/test_x.py::test", 1.0, ()),
        Verdict("a.py:2 sign", "lsys/data", "-y", "y", "survived", "", 9.0, ()),
        Verdict("a.py:3 sign", "lsys/data", "-z", "z", "no fault", "", 2.0, ()),
        Verdict("a.py:5 sign", "lsys/data", "-v", "v", "open", "", 9.0, ()),
        Verdict("a.py:4 sign", "lsys/data", "-w", "w", "survived", "", 9.0, ()),
        Verdict("thirteen at once", "known", "", "", "caught", "", 3.0, ()),
    ]
    text = page([({"seed": 3, "count": 2, "machine": "m", "commit": "c", "minutes": 1.0}, verdicts)])
    assert "1 of 1 were caught" in text and "## Drawn with seed 3" in text
    assert "caught 1 of 4, 25.0%; without the 1 that change nothing, 1 of 3, 33.3%. 1 more" in text
    assert "| lsys/data | 1 | 4 |" in text and "a.py:3" not in text
    assert "- a.py:2 sign: `-y` became `y`. no reason known: a test is missing." in text
    assert "have not judged them yet:\n\n- a.py:5 sign: `-v` became `v`\n" in text
    assert "- a.py:4 sign: `-w` became `w`. Nothing changes: w is 0." in text


ABOUT = {"seed": 1, "minutes": 0.0, "commit": "c"}


class Tests:
    """A checkout with tests that look at one word of a.py each."""

    def __init__(self, noticed: dict[str, str]) -> None:
        self.folder = ROOT
        self.files, self.noticed, self.runs = {"a.py": "one two three"}, noticed, list[int]()
        self.code: int | None = 0  # of a run in which nothing fails

    def text(self, file: str) -> str:
        return self.files[file]

    @contextlib.contextmanager
    def planted(self, places: Iterable[Place]) -> Iterator[None]:
        before = self.files
        self.files = before | changed(self.text, places)
        yield
        self.files = before

    def tests(self, paths: list[str], limit: float, *, to_the_end: bool = False) -> Outcome:
        names = paths if set(paths) <= set(self.noticed) else self.noticed
        failed = tuple(name for name in names if self.noticed[name] not in self.files["a.py"])
        self.runs.append(len(names))
        return Outcome(1 if failed else self.code, failed if to_the_end else failed[:1], 1.0)


def test_faults_planted_at_once_are_judged_alone_by_the_tests_that_failed(tmp_path: Path) -> None:
    copy = Tests({"t1": "one", "t2": "two", "t3": " "})
    judged = Judged(tmp_path / "out.json", ABOUT)
    for number, (start, old, new) in enumerate(
        [(0, "one", "ONE"), (8, "three", "THREE"), (4, "two", "TWO"), (4, "two th", "2")]
    ):
        judged.add(f"{number}", Verdict(f"{number}", "lsys", old, new, "open", "", 9.0, (("a.py", start, old, new),)))
    together([copy], ["0", "1", "2", "3"], judged)  # type: ignore[list-item]
    verdicts = [judged.verdicts[f"{number}"] for number in range(4)]
    assert [(each.outcome, each.by) for each in verdicts] == [
        ("caught", "t1"), ("survived", ""), ("caught", "t2"), ("caught", "t2"),
    ]  # fmt: skip
    # All tests with the first three; by the two that failed the first and third, the second alone, and then each of those; then the fourth,
    # which overlaps others, by all, and by what failed.
    assert copy.runs == [3, 2, 2, 2, 2, 3, 1, 3]  # and what survived again, by all
    assert copy.files == {"a.py": "one two three"}
    again = Judged(tmp_path / "out.json", ABOUT)
    assert again.verdicts == judged.verdicts and again.about == ABOUT | {"again": []}
    assert Judged(tmp_path / "out.json", ABOUT | {"commit": "d"}, again=True).about == ABOUT | {"again": ["d"]}


def test_all_tests_are_divided_over_copies_and_a_run_that_does_not_end_tells_nothing(tmp_path: Path) -> None:
    noticed = {"t1": "one", "t2": "two"}
    copies, judged = [Tests(noticed), Tests(noticed)], Judged(tmp_path / "out.json", ABOUT)
    for old in ("one", "two", "three"):
        place = ("a.py", "one two three".index(old), old, "-")
        judged.add(old, Verdict(old, "lsys", old, "-", "open", "", 9.0, (place,)))
    together(copies, ["one", "two"], judged)  # type: ignore[arg-type]
    assert judged.of("caught") == ["one", "two"]
    for copy in copies:
        copy.code = None
    together(copies, ["three"], judged)  # type: ignore[arg-type]
    assert judged.of("open") == ["three"]


@pytest.mark.parametrize(
    ("code", "failed", "ended", "by"),
    [
        (0, (), True, ""), (1, ("t",), True, "t"), (5, (), True, ""), (None, (), False, ""), (None, ("t",), False, "t"),
        (2, (), False, "pytest's exit code 2"), (-11, (), False, "pytest's exit code -11"),
    ],
)  # fmt: skip
def test_what_a_run_tells(code: int | None, failed: tuple[str, ...], ended: bool, by: str) -> None:
    found = Outcome(code, failed, 1.0)
    assert (found.has_ended, found.notices, found.by) == (ended, bool(by), by)


def test_survivors_are_judged_again_where_they_have_moved(tmp_path: Path) -> None:
    copy, judged = Tests({"t1": "two"}), Judged(tmp_path / "out.json", ABOUT)
    copy.files = {"a.py": "two one and then a two"}
    for name, old in (("x", "two"), ("y", "one")):
        judged.add(name, Verdict(name, "lsys", old, "-", "survived", "", 9.0, (("a.py", 12, old, "-"),)))
        _judge_again(copy, name, judged)  # type: ignore[arg-type]
    assert judged.verdicts["x"].changes == (("a.py", 19, "two", "-"),)  # of two places the one nearest to where it was
    assert judged.of("open") == ["x", "y"]
    copy.files = {"a.py": "now here is two"}
    _judge_again(copy, "x", judged)  # type: ignore[arg-type]
    assert judged.verdicts["x"].outcome == "caught" and judged.verdicts["x"].changes == (("a.py", 12, "two", "-"),)
    assert judged.verdicts["x"].by == "t1"


HANGS = """
import os, subprocess, sys, time

def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open("child", "w") as file:
        print(child.pid, file=file)
    try:
        time.sleep(600)
    except Exception:
        time.sleep(600)

def test_passes():
    assert os.getcwd()

def test_fails():
    assert not os.getcwd()
"""


RUN = """
import sys
from pathlib import Path
import pytest
from bench.mutation_parts import server

server.SPARE = 2.0
found = server.Found(Path("found.json"), {"test_some.py::test_hangs": 0.1})
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_some.py"], plugins=[found]))
"""


def test_a_test_that_does_not_end_is_ended_with_its_processes(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(HANGS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1, run.stdout + run.stderr
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["failed"] == ["test_some.py::test_hangs", "test_some.py::test_fails"]
    assert list(told["seconds"]) == [f"test_some.py::test_{name}" for name in ("hangs", "passes", "fails")]
    try:
        state = (Path("/proc") / (tmp_path / "child").read_text().strip() / "stat").read_text()
    except OSError:  # it is gone
        return
    assert ") Z " in state
