"""What users get wrong is told with its value and its rule before anything is lost, and the remedy that is told, applied here, makes the command work."""

import contextlib
import errno
import io
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.texts import write
from support.wrong_inputs import CASES, CONFIG, Case

from lsys.cli import main


class Started(Exception):
    """Process groups would start now, or the ranks of a sweep: nothing was refused."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a place where commands run, by path."""
    place = tmp_path_factory.mktemp("place")
    for name, size in (("a", 900), ("b", 400), ("c", 700)):
        write(place / "texts" / f"{name}.txt", f"text {name} " * (size // 7))
    write(place / "run.yaml", CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main("data prepare texts --out data/mine --workers 1".split()) == 0
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def place(corpus: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, content in corpus.items():
        write(tmp_path / name, content)
    monkeypatch.chdir(tmp_path)
    with (
        mock.patch("lsys.train.run.process_groups", side_effect=Started),
        mock.patch("lsys.bench.scaling._run", side_effect=Started),
    ):
        yield tmp_path


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what was said; 0 where process groups would have started."""
    try:
        code = main(shlex.split(words))
    except Started:
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    return code, said.err or said.out


def run_on_rank(rank: int, world_size: int, folder: str, words: str) -> tuple[int, str]:
    """`run` in a worker, with process groups; the disk is full while there is a file that says so."""
    from lsys.checkpoint.store import Checkpoints

    prepare, said = Checkpoints._prepare, io.StringIO()

    def full(self: Checkpoints, partial: Path) -> int:
        if Path("disk is full").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return prepare(self, partial)

    with (
        contextlib.chdir(folder),
        mock.patch.object(Checkpoints, "_prepare", full),
        mock.patch("lsys.train.saving.PAUSES", (0.0, 0.0)),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        code = main(shlex.split(words))
    return code, said.getvalue()


@pytest.fixture(scope="module")
def trained(corpus: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, gloo: Any) -> dict[str, bytes]:
    """The files of `corpus`, and of a run of two steps."""
    place = tmp_path_factory.mktemp("trained")
    for name, content in corpus.items():
        write(place / name, content)
    assert gloo(1, run_on_rank, str(place), "train run.yaml --train.steps 2")[0][0] == 0
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def told(case: Case, run: Callable[[str], tuple[int, str]]) -> None:
    """The case is refused or told of in its words, and no more with its remedy."""
    code, said = run(case.words)
    assert bool(code) if case.code is None else code == case.code, said
    assert "Traceback" not in said
    rest = said
    for part in case.told:
        assert part in rest, said
        rest = rest[rest.index(part) :]
    if case.remedy is not None:
        code, after = run(case.remedy(said.rstrip("\n"), case.words))
        assert code == 0, after
        assert not all(part in after for part in case.told)


def cases(*, trains: bool) -> Any:
    """Those that train, or those that must not."""
    params = [
        pytest.param(case, marks=pytest.mark.xfail(strict=True, reason=case.until) if case.until else ())
        for case in CASES
        if case.trains == trains
    ]
    return pytest.mark.parametrize("case", params, ids=lambda case: f"{case.row}: {case.words}"[:60])


@cases(trains=False)
def test_a_wrong_input_is_told_before_process_groups_and_its_remedy_works(
    case: Case, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.before()
    capsys.readouterr()
    told(case, lambda words: run(words, capsys))


@cases(trains=True)
def test_what_a_run_would_lose_is_told_and_the_remedy_works(
    case: Case, trained: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gloo: Any
) -> None:
    for name, content in trained.items():
        write(tmp_path / name, content)
    monkeypatch.chdir(tmp_path)
    case.before()
    told(case, lambda words: gloo(1, run_on_rank, str(tmp_path), words)[0])


@pytest.mark.slow
def test_torchrun_says_what_is_wrong_first_and_once(place: Path) -> None:
    """Row 47."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lsys"]
    command += ["train", "run.yaml", "--parallel.tensr", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "OMP_NUM_THREADS" not in line]
    assert lines[0] == "lsys: parallel.tensr: unknown key; did you mean tensor?"
    assert done.stderr.count("did you mean") == 1


def test_every_row_has_its_case() -> None:
    assert {case.row for case in CASES} == set(range(1, 49)) - {47}
