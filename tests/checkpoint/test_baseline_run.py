"""A run that commit 8598be0 began goes on: its checkpoint, its folder, its curves, its record."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BASELINE = Path(__file__).parents[1] / "baseline"
SEEN = json.loads((BASELINE / "seen.json").read_text())
CURVES = ("loss_metrics/global_avg_loss", "grad_norm", "loss_metrics/validation_loss")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the baseline, where its run was."""
    return Path(shutil.copytree(BASELINE, tmp_path / "baseline"))


def lsys(folder: Path, *words: str, ranks: int = 1) -> str:
    """What a command prints, on so many ranks."""
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*(torchrun if ranks > 1 else python), "lsys", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def curves(run: Path) -> dict[str, dict[str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: {str(point.step): point.value for point in events.Scalars(tag)} for tag in CURVES}


def test_the_run_goes_on_with_the_same_losses_beside_its_own_record(folder: Path) -> None:
    record = shutil.copy(folder / "run" / "scaling.json", folder / "before.json")
    printed = lsys(folder, "train", "run.yaml", "--metrics.baseline", Path(record).name, ranks=2)
    assert "resumed after step 4 of 8" in printed and "| efficiency " in printed
    assert "is of an earlier version: whether the tokens of corpus are what they were is not known" in printed
    assert curves(folder / "run") == {tag: pytest.approx(SEEN[tag], rel=2e-6) for tag in CURVES}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "run" / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("waterfall/all_parts")] == [8]
    assert [point.step for point in events.Scalars("waterfall/compute(%)")] == list(range(1, 9))
    (text,) = events.Tensors("corpora/text_summary")[-1].tensor_proto.string_val
    assert b"corpus | 1 | 2,976 | 12 | bytes | 1d5a2d3b" in text


def logits(rank: int, world_size: int, run: str, prompt: bytes) -> list[float]:
    """What follows a prompt, by a checkpoint's weights."""
    import torch

    from lsys.checkpoint.manifest import Manifest
    from lsys.config.load import loads
    from lsys.generate import Decoder, one_device
    from lsys.runtime import install_megatron
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    install_megatron()
    path = Path(run) / "checkpoints" / "step-00000004"
    manifest = Manifest.read(path)
    settings = one_device(loads(manifest.cursor.config))
    with process_groups(settings.parallel, Launch()) as groups:
        decoder = Decoder.load(settings, groups, path, manifest)
        return decoder.read(torch.tensor(list(prompt)))[-1].tolist()


def test_its_weights_generate(gloo: Any, folder: Path) -> None:
    [found] = gloo(1, logits, str(folder / "run"), b"the state")
    assert found[: len(SEEN["logits"])] == pytest.approx(SEEN["logits"], abs=1e-5)
