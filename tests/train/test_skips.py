"""A run whose updates are not finite: told, counted, stopped at the limit, no checkpoint meanwhile; and a launcher's restart ends at once."""

import contextlib
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support import parity, planting
from support.delays import StubData

from lsys.runtime.job import Job
from lsys.train import stopped
from lsys.train.errors import InputError, PeerError, step_named
from lsys.train.protocol import Losses, Update
from lsys.train.stopped import Marker, StoppedError

NAN = "the gradient of decoder.layers.1.input_layernorm.weight is not finite on rank"


def train(
    rank: int,
    world_size: int,
    folder: str,
    wrong: tuple[int, ...],
    steps: int = 4,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A run with a NaN in a gradient of the last rank in the steps `wrong`, counted from its start: what it says, how it ends, what is saved.

    Args:
        options: `every`: of checkpoints. `keys`: of the configuration. `parameter`: a step after which a parameter is NaN.
    """
    from lsys.config.schema import Checkpoint, Metrics
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine
    from lsys.train.errors import RunError
    from lsys.train.run import Run

    options = options or {}
    config = parity.settings(train__steps=steps, train__folder=Path(folder), **options.get("keys", {}))
    metrics, checkpoint = Metrics(every=1, waterfall_every=0), Checkpoint(every=options.get("every", 2), keep=9)
    config = config.model_copy(update={"metrics": metrics, "checkpoint": checkpoint})

    def engine_of(settings: Any, groups: Any) -> Any:
        engine = Engine(settings, groups)
        for number in wrong:
            planting.plant(engine, step=number, rank=world_size - 1, parameter="layers.1.input_layernorm")
        update = engine.step

        def step() -> Update:
            done = update()
            if engine.scheduler.num_steps == options.get("parameter") and rank == world_size - 1:
                next(engine.chunks[0].module.parameters()).data.view(-1)[0] = math.nan
            return done

        engine.step = step  # type: ignore[method-assign]
        return engine

    said, error = io.StringIO(), None
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("lsys.train.data.open_data", StubData))
        stack.enter_context(mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None))
        stack.enter_context(mock.patch.dict("os.environ", {"TORCHELASTIC_RUN_ID": options.get("job", "a")}))
        groups = stack.enter_context(process_groups(config.parallel, Launch(rank=rank, world_size=world_size)))
        stack.enter_context(contextlib.redirect_stdout(said))
        try:
            Run(config, groups, make_engine=engine_of).train()
        except RunError as raised:
            error = raised
    saved = sorted(int(path.name[5:]) for path in Path(folder, "checkpoints").glob("step-*"))
    return {
        "said": said.getvalue(),
        "error": str(error or ""),
        "code": getattr(error, "exit_code", 0),
        "saved": saved,
    }


def curve(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {point.step: point.value for point in events.Scalars(tag)}


@pytest.mark.fault("NaN gradient at a save step")
def test_a_skipped_step_is_told_counted_and_not_saved(gloo: Any, tmp_path: Path) -> None:
    first, second = gloo(2, train, str(tmp_path), (2,), 4)
    assert first["error"] == "" and first["saved"] == [3, 4]  # that of step 2 is made after step 3
    assert f"step 2: no update was made: {NAN} 1 (loss 4." in first["said"]
    assert "1 in a row, 1 in all" in first["said"] and second["said"] == ""
    assert "no checkpoint of step 2 is written: the update of step 2 was not made" in first["said"]
    assert curve(tmp_path, "train/skipped_steps") == {1: 0, 2: 1, 3: 1, 4: 1}
    assert set(curve(tmp_path, "grad_norm")) == {1, 3, 4} and set(curve(tmp_path, "loss_metrics/global_avg_loss")) == {
        1,
        2,
        3,
        4,
    }
    assert "grad norm - |" in first["said"]
    again, _ = gloo(2, train, str(tmp_path), (5,), 6)  # steps of the engine go on with the run's
    assert (
        "resumed after step 4" in again["said"] and curve(tmp_path, "train/skipped_steps")[6] == 2
    )  # of the whole run


@pytest.mark.fault("NaN gradient at the last step")
def test_at_the_last_step_the_run_does_not_claim_success(gloo: Any, tmp_path: Path) -> None:
    first, second = gloo(2, train, str(tmp_path), (4,), 4)
    assert first["code"] == second["code"] == 1 and first["error"] == second["error"] and first["saved"] == [2]
    assert "no checkpoint of step 4 is written: the update of step 4 was not made" in first["error"]
    assert "the newest checkpoint is" in first["error"] and "step-00000002" in first["error"]


def test_a_parameter_that_is_not_finite_is_not_saved(gloo: Any, tmp_path: Path) -> None:
    (found,) = gloo(1, train, str(tmp_path), (), 2, {"parameter": 2, "keys": {"optimizer__distributed": False}})
    assert found["saved"] == [] and found["code"] == 1
    assert (
        "no checkpoint of step 2 is written: embedding.word_embeddings.weight is not finite on rank 0" in found["error"]
    )


def test_the_limit_stops_and_only_a_restart_stops_again(gloo: Any, tmp_path: Path) -> None:
    limit = {"keys": {"train__skip_limit": 2}, "every": 1}
    first, second = gloo(2, train, str(tmp_path), (2, 4, 5, 6), 8, limit)
    assert first["code"] == second["code"] == stopped.EXIT_CODE and first["saved"] == [1, 3]
    assert first["error"].startswith("stopped after step 5: 2 updates in a row were not made (train.skip_limit)")
    assert NAN in first["error"] and "step-00000003" in first["error"]
    with pytest.raises(StoppedError) as again:
        stopped.refuse_restart(tmp_path, Job(run="a"))
    assert str(again.value) == first["error"] == second["error"] and again.value.exit_code == 3
    stopped.refuse_restart(tmp_path, Job(run="b"))
    said = stopped.clear(tmp_path)
    assert "is removed, since this is a new start" in said and first["error"] in said
    stopped.refuse_restart(tmp_path, Job(run="a"))
    assert stopped.clear(tmp_path) == "" and not (tmp_path / stopped.NAME).exists()


def test_a_restart_ends_before_torch_is_imported(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    config = {
        "model": {"pattern": "L", "layers": 1, "hidden": 8, "heads": 1, "head_dim": 8, "vocab": 8},
        "data": {"corpora": [{"path": str(tmp_path / "none")}]},
        "train": {"folder": str(tmp_path), "steps": 1, "batch_tokens": 8, "micro_batch_tokens": 8},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    Marker("stopped after step 5", Job(run="a")).write(tmp_path)
    program = f"import sys; from lsys.cli import main; code = main(['train', {str(tmp_path / 'run.yaml')!r}]); "
    program += "sys.exit(code if 'torch' not in sys.modules else 99)"
    launch = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | launch, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (stopped.EXIT_CODE, "lsys: stopped after step 5\n")


@pytest.mark.parametrize("text", ["", "{}", '{"reason": 1, "job": {"run": "a"}}', "\udcff"])
def test_a_marker_that_cannot_be_read_stops_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / stopped.NAME).write_text(text, errors="surrogateescape")
    stopped.refuse_restart(tmp_path, Job(run="a"))
    assert "is removed" in stopped.clear(tmp_path)


def losses(tokens: int = 10) -> Losses:
    return Losses(entropy=20.0, z_loss=0.0, tokens=tokens, values=SimpleNamespace())  # type: ignore[arg-type]


def updates() -> tuple[Any, list[str]]:
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.train.skips import Updates

    said: list[str] = []
    return Updates(said.append), said


def test_a_spike_is_told_with_its_step() -> None:
    found, said = updates()
    for step, norm in enumerate([50.0, *[1.0, 3.0, 2.0] * 6], start=1):
        found.note(step, losses(), Update(norm, True), "")
    assert said == []  # too few before the first
    found.note(20, losses(), Update(20.0, True), "")
    assert said == []  # 10 times the median of 2 is none yet
    found.note(21, losses(), Update(20.1, True), "")
    assert said == ["step 21: a spike: the gradient norm is 20.1, 10.1 times the median of the last 20 steps (2)"]


@pytest.mark.parametrize(("before", "told"), [(15, False), (16, True)])
def test_a_spike_is_one_beside_sixteen_norms_at_least(before: int, told: bool) -> None:
    found, said = updates()
    for step in range(1, before + 2):
        found.note(step, losses(), Update(1.0 if step <= before else 50.0, True), "")
    assert bool(said) == told, said


def test_a_step_without_targets_is_told() -> None:
    found, said = updates()
    found.note(7, losses(tokens=0), Update(0.0, True), "")
    assert said == ["step 7: no target counts, all are masked: there is no loss, and no point of its curve"]


def test_a_nan_in_a_kernels_input_names_step_and_rank() -> None:
    from lsys.kernels.linear_attention.checks import check_tensors
    from lsys.parallel.attention import softmax_attention
    from lsys.parallel.layout import SequenceLayout

    q = torch.zeros(4, 1, 8)
    q[2, 0, 3] = math.nan
    calls: list[Any] = [
        lambda: softmax_attention(q, q, q, SequenceLayout.contiguous((4,), 1), None),
        lambda: check_tensors(q, q, q, None, None),
    ]
    for call in calls:
        with pytest.raises(InputError) as caught, step_named("step 12", 3):
            call()
        assert str(caught.value).startswith("step 12, rank 3: q has ") and not caught.value.everywhere
        assert "goes on from the newest checkpoint" in str(caught.value)


def test_a_rank_whose_peer_ended_says_so_in_one_line() -> None:
    with pytest.raises(PeerError, match="^step 12, rank 3: another rank ended") as caught, step_named("step 12", 3):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:33")
    assert not caught.value.everywhere
    with pytest.raises(RuntimeError, match="^out of memory"), step_named("step 12", 3):
        raise RuntimeError("out of memory")
