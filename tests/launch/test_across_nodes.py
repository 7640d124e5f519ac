"""Starting runs on several nodes, which are network namespaces: planted faults, a killed rank, and the lab's own end."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.lab import Lab, LabUnavailable, lab
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lsys.data.prepare import PrepareArgs, prepare

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "model": {"pattern": "LS", "layers": 2, "hidden": 32, "heads": 4, "groups": 2, "head_dim": 8, "vocab": 257},
    "optimizer": {"lr": 0.01, "warmup_steps": 2},
    "train": {"steps": 24, "batch_tokens": 1024, "micro_batch_tokens": 256, "precision": "fp32", "timeout_minutes": 1},
    "checkpoint": {"every": 4},
    "metrics": {"every": 1, "tensorboard": False},
}


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Lab]:
    try:
        with lab(3) as made:
            yield made
    except LabUnavailable as error:
        pytest.skip(f"no lab: {error}")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("corpus") / "tests"
    prepare(PrepareArgs(sources=[str(Path(__file__).parent)], out=prefix, suffix=[".py"]))
    return prefix


def write_config(folder: Path, corpus: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tree = CONFIG | {
        "data": {"corpora": [{"path": str(corpus)}]},
        "train": CONFIG["train"] | {"folder": str(folder / "run")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"


def preflight(
    it: Lab, words: dict[int, list[str]], prelude: dict[int, str] | None = None
) -> dict[int, tuple[int, str]]:
    """Exit code and output of the preflight on some nodes; `prelude` is what a node's shell does first."""
    options = "--preflight-only --nodes 3 --ranks 1 --host 10.91.0.1 --interface eth0 --job secret".split()
    started = {}
    for node, own in words.items():
        shell = f'{(prelude or {}).get(node, "true")} && exec "$@"'
        command = ["run", str(node), "bash", "-c", shell, "-", str(ROOT / "launch" / "run.sh")]
        started[node] = subprocess.Popen(
            it.command(*command, *options, "--node", str(node), *own),
            env=it.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return {node: (each.wait(100), each.communicate()[0]) for node, each in started.items()}


def test_another_configuration_and_another_storage(three_nodes: Lab, tmp_path: Path, corpus: Path):
    config = write_config(tmp_path, corpus)
    (tmp_path / "run").mkdir()
    words = {node: [str(config), "--train.batch-tokens", "768"] for node in range(3)}
    words[1] += ["--optimizer.lr", "0.5"]
    # A mount in a node is its own: ip gives each command a mount namespace.
    told = preflight(three_nodes, words, {2: f"mount -t tmpfs none {tmp_path / 'run'}"})
    assert [code for code, _ in told.values()] == [2, 2, 2], told
    lines = told[0][1].splitlines()
    assert lines[0].startswith("preflight: 3 of 3 nodes x 1 ranks; clocks within") and "MB/s" in lines[0]
    findings = [line for line in lines[2:] if "warning" not in line]
    assert len(findings) == 2, lines
    assert re.search(r"/10\.91\.0\.2: optimizer\.lr is 0\.5, on 2 other nodes 0\.01; every node must read", findings[0])
    assert re.search(r"/10\.91\.0\.3: train\.folder .*/run is not the storage that .*/10\.91\.0\.1 sees", findings[1])
    assert "optimizer.lr is 0.5" in told[1][1] and "storage" not in told[1][1]
    assert not any((tmp_path / "run").iterdir())


def test_a_node_does_not_come(three_nodes: Lab):
    told = preflight(three_nodes, {0: ["--join", "3", "--", "x"], 1: ["--join", "3", "--", "x"]})
    assert told[0][0] == 2 and told[1][0] == 2
    assert re.search(
        r"node 2: did not come \(2 of 3 nodes came: \S+/10.91.0.1, \S+/10.91.0.2\); start the same", told[0][1]
    )


def test_two_nodes_do_not_reach_each_other(three_nodes: Lab):
    words = {node: ["--", "x"] for node in range(3)}
    three_nodes.shell("run", "1", "ip", "route", "add", "unreachable", "10.91.0.3/32")
    try:
        told = preflight(three_nodes, words)
    finally:
        three_nodes.shell("run", "1", "ip", "route", "del", "unreachable", "10.91.0.3/32")
    assert [code for code, _ in told.values()] == [2, 2, 2]
    assert re.search(r"/10\.91\.0\.2: does not reach \S+ \(10\.91\.0\.3\): No route to host", told[0][1]), told[0][1]
    assert re.search(r"/10\.91\.0\.3: does not reach \S+ \(10\.91\.0\.2\): no answer in 3 s", told[0][1]), told[0][1]
    assert "/10.91.0.1: does not" not in told[0][1]


def test_a_node_without_its_link(three_nodes: Lab):
    words = {node: ["--join", "3", "--", "x"] for node in range(3)}
    told = preflight(three_nodes, words, {2: "ip link set eth0 down"})
    three_nodes.shell("run", "2", "ip", "link", "set", "eth0", "up")
    assert [code for code, _ in told.values()] == [2, 2, 2]
    assert "node 2: did not come (2 of 3" in told[0][1]
    assert "the host 10.91.0.1:29500 does not answer in 3 s" in told[2][1], told[2][1]


@pytest.mark.slow
def test_a_killed_rank_changes_nothing(three_nodes: Lab, tmp_path: Path, corpus: Path):
    whole = write_config(tmp_path / "whole", corpus)
    parts = write_config(tmp_path / "parts", corpus)
    two = ["--nodes", "2"]  # of the three
    assert finish(start_two(three_nodes, whole, two), tmp_path / "whole") == [0, 0]
    agents = start_two(three_nodes, parts, two)
    log = tmp_path / "parts" / "node0.log"
    wait_for(log, r"step +9/24")
    for process in subprocess.run(
        ["ip", "netns", "pids", f"{three_nodes.name}-1"], capture_output=True, text=True
    ).stdout.split():
        if b"RANK=1" in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            os.kill(int(process), signal.SIGKILL)
    assert finish(agents, tmp_path / "parts") == [0, 0]
    assert re.search(r"resumed after step (8|12|16|20) of 24", log.read_text())
    expected, resumed = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert expected.keys() == resumed.keys() and any("exp_avg" in name for name in expected)
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def start_two(it: Lab, config: Path, words: list[str]) -> list[subprocess.Popen]:
    agents = []
    for node in range(2):
        command = [str(ROOT / "launch" / "run.sh"), *words, "--host", "10.91.0.1", "--job", "secret", "--ranks", "1"]
        agents.append(
            subprocess.Popen(
                it.command("run", str(node), *command, "--no-preflight", str(config)),
                env=it.environment,
                stdout=(config.parent / f"node{node}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    return agents


def finish(agents: list[subprocess.Popen], folder: Path) -> list[int]:
    codes = [agent.wait(200) for agent in agents]
    assert codes == [0, 0], "".join(log.read_text() for log in folder.glob("*.log"))
    return codes


def wait_for(log: Path, pattern: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not re.search(pattern, log.read_text() if log.exists() else ""):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, of model and optimizer."""
    last = max((folder / "run" / "checkpoints").iterdir())
    assert last.name.endswith("24")
    stored = FileSystemReader(last).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in stored.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(tensors, storage_reader=FileSystemReader(last), no_dist=True)
    return tensors


def bench_lab(*words: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lsys", "bench", "lab", *words]
    environment = os.environ | variables
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def spaces(process: subprocess.Popen) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    return [name for name in listed if name.startswith(f"lsys-lab-{process.pid}-")]


WORKER = "import os, sys, time; print('rank', os.environ['RANK'], flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"


@pytest.mark.slow
@pytest.mark.usefixtures("three_nodes")
def test_bench_lab_gives_the_jobs_exit_code_and_bytes(tmp_path: Path):
    (tmp_path / "work.py").write_text(WORKER)
    words = ["--nodes", "2", "--rate", "1gbit", "--slow", "1:100mbit", "--restarts", "0", "--logs", str(tmp_path)]
    process = bench_lab(*words, "--", str(tmp_path / "work.py"), "0", "3")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "the job ended with code 1" in err, out + err  # torchrun's own code
    assert "preflight: 2 of 2 nodes" in out and "rank 0" in out
    assert "sends at 1" in (tmp_path / "preflight" / "node0.log").read_text()  # the slow link: about 12 MB/s
    assert re.search(r"node +sent MB +received MB", out) and f"{tmp_path}/node1.log" in out
    assert spaces(process) == []


@pytest.mark.slow
@pytest.mark.usefixtures("three_nodes")
def test_bench_lab_is_taken_down_when_it_is_stopped(tmp_path: Path):
    (tmp_path / "work.py").write_text(WORKER)
    process = bench_lab("--no-preflight", "--logs", str(tmp_path), "--", str(tmp_path / "work.py"), "100", "0")
    wait_for(tmp_path / "node0.log", "rank 0")
    assert len(spaces(process)) == 3
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM and "stopping the job" in err, out + err
    assert spaces(process) == []


def test_bench_lab_says_what_it_lacks(tmp_path: Path):
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    process = bench_lab("--", "x.py", PATH=str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err == "lsys: needs the commands ip and tc: install iproute2\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name a YAML file to train, or a program after --"),
        (
            ["--rate", "1gb", "--", "x.py"],
            "a rate is a whole number of kbit, mbit or gbit, as 100mbit, or none; got '1gb'",
        ),
        (["--slow", "2:1gbit", "--", "x.py"], "numbered from 0; got 2 and rates for [2]"),
        (["--slow", "1gbit", "--", "x.py"], "--slow takes NODE:RATE, as 1:100mbit; got '1gbit'"),
        (["--fast", "--", "x.py"], "'--fast' is no option"),
    ],
)
def test_words_that_bench_lab_refuses(words: list[str], told: str, capsys: pytest.CaptureFixture):
    from lsys.cli import main

    assert main(["bench", "lab", *words]) == 2
    assert told in capsys.readouterr().err
