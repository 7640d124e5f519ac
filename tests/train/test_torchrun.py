"""Runs as a user starts them: torchrun, a YAML, a corpus on disk; two agents equal one; SIGTERM saves; a resumed curve is one curve."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lsys.data.prepare import PrepareArgs, prepare

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "model": {"pattern": "LS", "layers": 2, "hidden": 32, "heads": 4, "groups": 2, "head_dim": 8, "vocab": 257},
    "optimizer": {"lr": 0.01, "warmup_steps": 2},
    "train": {
        "steps": 8,
        "batch_tokens": 1024,
        "micro_batch_tokens": 256,
        "precision": "fp32",
        "validate_tokens": 1000,
        "timeout_minutes": 1,
    },
    "checkpoint": {"every": 4},
    "metrics": {"every": 1},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of this project's own test files."""
    prefix = tmp_path_factory.mktemp("corpus") / "tests"
    prepare(PrepareArgs(sources=[str(Path(__file__).parents[1])], out=prefix, suffix=[".py"]))
    return prefix


def write_config(folder: Path, corpus: Path, **train: object) -> Path:
    path = folder / "config.yaml"
    tree = CONFIG | {
        "data": {"corpora": [{"path": str(corpus)}], "validation_fraction": 0.1},
        "train": CONFIG["train"] | {"folder": str(folder / "run")} | train,
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def torchrun(launch: list[str], config: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "lsys", "train", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    return output


def losses(folder: Path, tag: str = "loss_metrics/global_avg_loss") -> dict[int, float]:
    """The curve in TensorBoard; a step that is there twice fails."""
    points = [(event.step, event.value) for event in curves(folder).Scalars(tag)]
    assert len(dict(points)) == len(points), points
    return dict(points)


def curves(folder: Path) -> Any:
    """What TensorBoard reads of the run, which is one run for it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (where,) = {path.parent for path in folder.rglob("*tfevents*")}
    events = EventAccumulator(str(where))
    events.Reload()
    return events


def one_node(ranks: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(ranks)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_agents_equal_one_node(tmp_path: Path, corpus: Path) -> None:
    degrees = ("--parallel.tensor", "2", "--parallel.context", "2")
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    finish(torchrun(one_node(4), write_config(one, corpus), *degrees))
    config, port = write_config(two, corpus), free_port()
    launch = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    agents = [torchrun([*launch, "--rdzv-conf", f"is_host={int(i == 0)}"], config, *degrees) for i in range(2)]
    for agent in agents:
        finish(agent)
    assert losses(two) == losses(one) and len(losses(one)) == 8


def test_pipeline_reports_the_last_stages_loss(tmp_path: Path, corpus: Path) -> None:
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    finish(torchrun(one_node(1), write_config(one, corpus)))
    output = finish(torchrun(one_node(2), write_config(two, corpus), "--parallel.pipeline", "2"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    tag = "loss_metrics/validation_loss"
    assert losses(two, tag) == pytest.approx(losses(one, tag), rel=1e-5)
    assert "bigram entropy" in output


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, corpus: Path) -> None:
    (whole := tmp_path / "whole").mkdir()
    (parts := tmp_path / "parts").mkdir()
    many = {"steps": 60}
    finish(torchrun(one_node(2), write_config(whole, corpus, **many)))
    config = write_config(parts, corpus, **many)
    first = torchrun(one_node(2), config)
    assert first.stdout is not None
    for line in first.stdout:
        if re.search(r"step +11/60", line):
            break
    first.send_signal(signal.SIGTERM)
    rest, _ = first.communicate(timeout=60)
    assert "SIGTERM: saving after step" in rest
    saved = sorted(path.name for path in (parts / "run" / "checkpoints").iterdir())
    assert saved and "partial" not in "".join(saved)
    assert "resumed after step" in finish(torchrun(one_node(2), config))
    assert losses(parts) == losses(whole) and len(losses(whole)) == 60
    pictures = [image.step for image in curves(parts).Images("waterfall/all_parts")]
    assert pictures[0] < 60 == pictures[-1]  # at the first run's end, and at the second's
    assert "nothing to do" in finish(torchrun(one_node(2), config))


def test_mistakes_are_said_once_before_any_process_group(tmp_path: Path, corpus: Path) -> None:
    process = torchrun(
        one_node(2), write_config(tmp_path, corpus), "--parallel.tensor", "3", "--train.batch-tokens", "1000"
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert output.count("tensor 3 does not divide 2 ranks") == 1
    assert output.count("1000 tokens are not whole micro-batches of 256") == 1
    assert "lsys/cli.py" not in output  # torchrun prints a traceback of its own, lsys none
