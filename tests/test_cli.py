"""The command line: what it prints, its exit codes, and what it must not import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lsys.cli import COMMANDS, main
from lsys.config.model import LinearMixer
from lsys.config.schema import Profile
from lsys.mixers.registry import ALL
from lsys.runtime.environment import FOREIGN, Foreign, Launch, LaunchError, launch_from_environment, require_launcher

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (launcher.size for launcher in FOREIGN)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *sizes):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("words", [[], ["--help"], ["data"], ["data", "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(words) == 0
    assert "check CONFIG --world-size N" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "check", "topology"])
def test_help_lists_every_key_of_the_configuration(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    keys = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    assert len(keys) > 60
    sections = {"corpora", *LinearMixer.model_fields, "linear", *Profile.model_fields, "profile", *ALL, "mixers"}
    # told by their own keys, which other sections have too
    for key in set(keys) - sections:
        assert re.search(rf"--[a-z_.0-9-]+\.{key.replace('_', '-')} ", out), key
    assert (
        "--data.corpora.0.path" in out
        and "--model.linear.decay" in out
        and "--model.mixers.lightning.decay" in out
        and "Optimizer steps" in out
    )


@pytest.mark.parametrize("words", [["--train.steps"], []])
def test_a_malformed_command_line_is_told_once(
    words: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main(["train", *([QUICKSTART] if words else []), *words])
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert ((words or ["PATH"])[0] in captured.out + captured.err) == (rank == "0")


def test_unknown_options_are_told_with_all_other_mistakes(capsys: pytest.CaptureFixture) -> None:
    words = ["--parallel.tensr", "2", "--train.steps", "0", "--fast", "stray", "--train.sed"]
    assert main(["train", QUICKSTART, *words]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "lsys: 4 mistakes",
        "  '--fast' is no option; write --section.key value, such as --parallel.tensor 2",
        "  train.sed: no value was given; write --train.sed VALUE",
        "  parallel.tensr: unknown key; did you mean tensor?",
        "  train.steps: 0 does not do: it should be greater than 0 (Optimizer steps)",
    ]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--lr", "1e-3"], "--optimizer.lr 1e-3"),
        (["--lr=1e-3"], "--optimizer.lr 1e-3"),
        (["--tp", "2"], "--parallel.tensor 2"),
        (["--steps", "99"], "--train.steps 99"),
        (["--micro-batch-token", "512"], "--train.micro_batch_tokens 512"),
        (["parallel.tensor=2"], "--parallel.tensor 2"),
        (["parallel.tensor", "2"], "--parallel.tensor 2"),
    ],
)
def test_options_that_were_meant_are_named(words: list[str], meant: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["topology", QUICKSTART, "--world-size", "2", *words]) == 2
    assert capsys.readouterr().err == f"lsys: {words[0].split('=')[0]!r} is no option; did you mean {meant}?\n"
    assert main(["topology", QUICKSTART, "--world-size", "2", *meant.split()]) == 0


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["train.steps", "2k"], "write 2000, or 2048"),
        (["train.batch_tokens", "4M"], "write 4000000, or 4194304"),
        (["train.steps", "two"], "write it in digits, such as 8"),
        (["train.steps", "40 steps"], "did you mean 40?"),
        (["train.steps", "2.5"], "2 or 3 does"),
        (["optimizer.lr", "3e-3x"], "did you mean 3e-3?"),
        (["optimizer.lr", "high"], "write it in digits, such as 3e-4"),
    ],
)
def test_numbers_that_were_meant_are_named(words: list[str], remedy: str, capsys: pytest.CaptureFixture) -> None:
    key, value = words
    assert main(["check", QUICKSTART, "--world-size", "2", f"--{key}", value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lsys: {key}: ") and line.endswith(f"; {remedy}")


def test_unknown_commands(capsys: pytest.CaptureFixture) -> None:
    assert main(["fly"]) == 2
    assert (
        "'fly' is no command; there are train, check, topology, generate, data prepare, data inspect"
        in capsys.readouterr().err
    )
    assert main(["data", "fly"]) == 2


@pytest.mark.parametrize(
    ("wrong", "meant"), [("trian", "train"), ("prepare", "data prepare"), ("data inspct", "data inspect")]
)
def test_commands_that_were_meant_are_named(wrong: str, meant: str, capsys: pytest.CaptureFixture) -> None:
    assert main(wrong.split()) == 2
    assert f"{wrong!r} is no command; did you mean {meant}? there are" in capsys.readouterr().err


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
    for part in (
        "softmax mixer",
        "lightning attention",
        "micro-batches per replica (accumulation)",
        "tokens of the run",
    ):
        assert part in out
    assert "│ data     │ 2      │ 4      │ 0 4 " in out


def test_check_prints_what_each_way_of_attention_costs(capsys: pytest.CaptureFixture) -> None:
    words = ["check", QUICKSTART, "--world-size", "4", "--parallel.context", "4", "--ranks-per-node", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "softmax layers over 4 context ranks on 2 nodes" in out and "window layers" not in out
    assert [line.split()[1] for line in out.splitlines() if "taken" in line] == ["usp"]
    assert main([*words, "--parallel.attention", "ring"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if "taken as configured" in line] == ["ring"]


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


def test_unknown_keys_do_not_hide_what_the_rules_refuse(capsys: pytest.CaptureFixture) -> None:
    words = ["--world-size", "2", "--parallel.tensr", "2", "--parallel.tensor", "3", "--model.heads", "5"]
    assert main(["check", QUICKSTART, *words]) == 2
    refused = capsys.readouterr().err
    assert "parallel.tensr: unknown key; did you mean tensor?" in refused
    assert "parallel: tensor 3 does not divide 2 ranks" in refused and "model.heads" in refused


def test_files_are_looked_for_on_request(capsys: pytest.CaptureFixture) -> None:
    words = ["check", QUICKSTART, "--world-size", "2", "--data.corpora.0.path", "nowhere/at_all"]
    told = "data.corpora.0.path: nowhere/at_all.bin and nowhere/at_all.idx not found"
    assert main(words) == 0
    assert f"notice: on this machine: {told}" in capsys.readouterr().out
    assert main([*words, "--files"]) == 2
    assert told in capsys.readouterr().err


def test_rules_and_files_are_told_together_and_once_a_node(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", QUICKSTART, "--data.corpora.0.path", "nowhere/at_all", "--parallel.tensor", "3"]
    words += ["--checkpoint.resume", "nowhere/step-3"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        assert main(words) == 2
        told = capsys.readouterr().err.splitlines()
        if rank % 2:
            assert told == []
        else:
            assert told[0].endswith("4 mistakes") and (rank == 0 or told[0].startswith("lsys, rank 2"))
            for part in ("parallel: tensor 3 ", "parallel.tensor: ", "data.corpora.0.path: ", "checkpoint.resume: "):
                assert any(line.startswith(f"  {part}") for line in told)


def test_a_folder_that_the_system_refuses_is_told_without_traceback(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(words: list[str]) -> int:
        raise PermissionError(13, "Permission denied", "some/folder")

    monkeypatch.setitem(COMMANDS, "check", refuse)
    assert main(["check"]) == 1  # it need not recur
    assert capsys.readouterr().err.startswith("lsys: some/folder: Permission denied; ")
    with pytest.raises(PermissionError):
        main(["check", "--debug"])


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


@pytest.mark.parametrize("ranks", ["0", "-2"])
def test_fewer_ranks_than_one_are_refused(capsys: pytest.CaptureFixture, ranks: str) -> None:
    assert main(["check", QUICKSTART, "--world-size", ranks]) == 2
    assert f"{ranks} ranks; a run has 1 or more" in capsys.readouterr().err


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
    del torchrun["GROUP_RANK"]
    with pytest.raises(LaunchError, match="GROUP_RANK, the number of this rank's node, is missing"):
        launch_from_environment(torchrun)


@pytest.mark.parametrize("launcher", FOREIGN, ids=lambda launcher: launcher.size)
def test_launchers_that_make_no_ranks_are_refused(
    launcher: Foreign, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by one of the processes; what torchrun or run.sh starts under the same launcher, and one process, may train."""
    told = {launcher.size: "4", launcher.number: "1"}
    with pytest.raises(LaunchError, match=f"{launcher.size} is 4: .* has started 4 processes, each of which") as caught:
        require_launcher(told)
    assert "launch/run.sh" in str(caught.value)
    require_launcher(told | {launcher.size: "1"})
    require_launcher(told | dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1"))
    monkeypatch.setenv(launcher.size, "2")
    for number in "01":
        monkeypatch.setenv(launcher.number, number)
        assert main(["train", QUICKSTART]) == 2
        assert (f"{launcher.size} is 2" in capsys.readouterr().err) == (number == "0")


def test_a_script_of_slurm_is_one_process() -> None:
    batch = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "3"}
    require_launcher(batch)
    with pytest.raises(LaunchError, match="SLURM_STEP_NUM_TASKS is 8"):  # srun's
        require_launcher(batch | {"SLURM_STEP_NUM_TASKS": "8"})
