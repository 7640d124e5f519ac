"""The command line: what it prints, its exit codes, and what it must not import."""

import subprocess
import sys
from pathlib import Path

import pytest

from lsys.cli import main
from lsys.runtime.environment import Launch, LaunchError, launch_from_environment

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("words", [[], ["--help"], ["data"], ["data", "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 0
    assert "check CONFIG --world-size N" in capsys.readouterr().out


def test_unknown_commands(capsys: pytest.CaptureFixture) -> None:
    assert main(["fly"]) == 2
    assert (
        "'fly' is no command; there are train, check, topology, data prepare, data inspect" in capsys.readouterr().err
    )
    assert main(["data", "fly"]) == 2


@pytest.mark.parametrize(
    "words", [["--help"], ["check", QUICKSTART, "--world-size", "2"], ["topology", QUICKSTART, "--world-size", "2"]]
)
def test_light_commands_import_neither_torch_nor_megatron(words: list[str]) -> None:
    code = (
        f"import sys; from lsys.cli import main; code = main({words!r});"
        "heavy = {'torch', 'megatron', 'numpy'} & sys.modules.keys(); sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TENSOR_AND_CONTEXT = ("--parallel.tensor", "2", "--parallel.context", "2")


def test_check_prints_what_the_configuration_resolves_to(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", QUICKSTART, "--world-size", "8", *TENSOR_AND_CONTEXT, "--optimizer.decay-steps", "5"]) == 0
    out = capsys.readouterr().out
    assert "  tensor: 2\n" in out and "sha256" in out
    assert "notice: optimizer.decay_steps has no effect: schedule is cosine, not wsd" in out
    for part in ("softmax mixer", "linear attention", "micro-batches per replica (accumulation)", "tokens of the run"):
        assert part in out
    assert "│ data     │ 2      │ 4      │ 0 4 " in out


def test_check_refuses_with_all_mistakes_and_without_traceback() -> None:
    words = ["check", QUICKSTART, "--world-size", "6", "--parallel.tensor", "4", "--parallel.context", "2"]
    words += ["--optimizer.min_lr", "1"]
    done = subprocess.run([sys.executable, "-m", "lsys", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "lsys: 3 mistakes" and len(lines) == 4
    assert lines[1] == "  parallel: tensor 4 x context 2 = 8 does not divide 6 ranks; tensor 1 does"
    debug = subprocess.run([sys.executable, "-m", "lsys", "--debug", *words], capture_output=True, text=True)
    assert "Traceback" in debug.stderr


def test_files_are_looked_for_on_request(capsys: pytest.CaptureFixture) -> None:
    words = ["check", QUICKSTART, "--world-size", "2", "--data.corpora.0.path", "nowhere/at_all"]
    assert main(words) == 0
    assert main([*words, "--files"]) == 2
    assert "data.corpora.0.path: nowhere/at_all.bin and nowhere/at_all.idx not found" in capsys.readouterr().err


def test_only_the_first_rank_tells_what_all_ranks_find(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", QUICKSTART, "--train.steps", "0"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, printed in (
        ("0", "lsys: train.steps: 0 does not do: it should be greater than 0 (Optimizer steps)\n"),
        ("1", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 2
        assert capsys.readouterr().err == printed


def test_topology(capsys: pytest.CaptureFixture) -> None:
    assert main(["topology", QUICKSTART, "--world-size", "8", *TENSOR_AND_CONTEXT, "--ranks-per-node", "4"]) == 0
    out = capsys.readouterr().out
    assert "│ 5    │ 1    │ 1      │ 0       │ 1    │ 4 5          │ 5 7           │ 1 5        │" in out
    assert "context 2: inside a node\ndata 2: over 2 nodes" in out


def test_launch() -> None:
    assert launch_from_environment({}) == Launch()
    torchrun = dict(
        RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", GROUP_RANK="1", MASTER_ADDR="a", MASTER_PORT="1"
    )
    assert launch_from_environment(torchrun) == Launch(5, 8, 1, 4, node=1, is_torchrun=True)
    with pytest.raises(LaunchError, match="RANK is 'x', not a number"):
        launch_from_environment({"RANK": "x"})
    with pytest.raises(LaunchError, match="RANK 2 is not below WORLD_SIZE 2"):
        launch_from_environment({"RANK": "2", "WORLD_SIZE": "2"})
