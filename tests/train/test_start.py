"""How runs begin: from their newest whole checkpoint, from another's, from weights, from scratch, each once, also after kill -9."""

import contextlib
import io
import itertools
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gloo import RankError
from support import parity, resuming

Told = tuple[str, list[tuple[float, float, float]]]


def life(rank: int, world_size: int, run: Path, options: dict[str, Any]) -> Told:
    """What a run prints, and loss, norm and learning rate of the steps that it takes.

    Args:
        options: `checkpoint`: that section; `kill`: the step after which each rank is killed; `torn`: the function of
            `lsys.checkpoint.store` in which it is, and in which of its calls; the rest changes the configuration.
    """
    from lsys.config.schema import Checkpoint, Metrics
    from lsys.runtime import install_megatron

    install_megatron()
    from support.plain_engine import Data, plain_engine

    from lsys.checkpoint import store
    from lsys.checkpoint.choice import keeps_folder
    from lsys.observe.run_dir import require_own_folder
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.observers import Observers
    from lsys.train.run import Run

    kill, checkpoint = options.get("kill", 0), Checkpoint(every=2, keep=4, **options.get("checkpoint", {}))
    changes = {key: value for key, value in options.items() if "__" in key}
    config = parity.settings(**{"train__folder": run, "train__steps": 8} | changes)
    config = config.model_copy(update={"metrics": Metrics(every=1, waterfall_every=0), "checkpoint": checkpoint})
    require_own_folder(config, keeps_folder(config))
    said, seen, calls = io.StringIO(), [], itertools.count(1)
    original = Observers.end_step

    torn, number = options.get("torn", ("_synchronise", 0))
    function = getattr(store, torn)

    def tear(*given: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given)

    def end_step(self: Any, done: Any) -> None:
        seen.append((done.losses.mean, done.grad_norm, done.lr))
        original(self, done)
        if done.step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("lsys.train.data.open_data", Data))
        stack.enter_context(mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None))
        stack.enter_context(mock.patch.object(Observers, "end_step", end_step))
        stack.enter_context(mock.patch.object(store, torn, tear))
        groups = stack.enter_context(process_groups(config.parallel, Launch(rank=rank, world_size=world_size)))
        stack.enter_context(contextlib.redirect_stdout(said))
        Run(config, groups, make_engine=plain_engine).train()
    return said.getvalue(), seen


def killed(gloo: Any, run: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RankError, match="died of SIGKILL"):
        gloo(1, life, run, options)


def flip(checkpoint: Path) -> str:
    """Flip a bit in the middle of its largest file; that file's name."""
    file = max(checkpoint.glob("*.*"), key=lambda each: each.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
    return file.name


def line(told: Told) -> str:
    """What the run says of how it began."""
    return next(text for text in told[0].splitlines() if text.startswith(("resumed", "began", "checkpoint.resume")))


@pytest.fixture(scope="module")
def source(gloo: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A run of eight steps, and what it told."""
    run = tmp_path_factory.mktemp("source") / "run"
    [told] = gloo(1, life, run, {})
    return run, told


@pytest.fixture
def earlier(source: tuple[Path, Told], tmp_path: Path) -> Path:
    """A copy of its folder, as if it had ended after step 4."""
    run = Path(shutil.copytree(source[0], tmp_path / "run"))
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    return run


def test_scratch_sets_aside_once(gloo: Any, source: tuple[Path, Told], earlier: Path) -> None:
    before = sorted(path.name for path in (earlier / "checkpoints").iterdir())
    scratch = {"checkpoint": {"resume": "scratch"}}
    killed(gloo, earlier, scratch | {"kill": 1})  # before it has a checkpoint
    assert sorted(path.name for path in (earlier / "before-1" / "checkpoints").iterdir()) == before
    assert (earlier / "before-1" / "tensorboard" / "run.json").exists()
    killed(gloo, earlier, scratch | {"kill": 5})
    [told] = gloo(1, life, earlier, scratch)
    assert line(told).startswith(f"resumed after step 4 of 8: {earlier}/checkpoints/step-00000004, written on 1 rank; ")
    assert "checkpoint.resume scratch was done when this run began" in line(told)
    assert told[1] == source[1][1][4:]
    assert not (earlier / "before-2").exists()


def test_a_path_is_where_a_run_starts_once(gloo: Any, source: tuple[Path, Told], earlier: Path, tmp_path: Path) -> None:
    path = {"checkpoint": {"resume": earlier}}
    killed(gloo, tmp_path / "new", path | {"kill": 5})  # before it has a checkpoint
    killed(gloo, tmp_path / "new", path | {"kill": 7})
    shutil.rmtree(earlier)
    [told] = gloo(1, life, tmp_path / "new", path)
    resumed = f"resumed after step 6 of 8: {tmp_path}/new/checkpoints/step-00000006, written on 1 rank"
    assert line(told) == f"{resumed}; checkpoint.resume {earlier} was done before, and is done once in a run"
    assert told[1] == source[1][1][6:]


def test_weights_begin_a_new_run_once(gloo: Any, source: tuple[Path, Told], earlier: Path, tmp_path: Path) -> None:
    path = {"checkpoint": {"weights": earlier / "checkpoints" / "step-00000004"}}
    [straight] = gloo(1, life, tmp_path / "straight", path)
    assert line(straight).startswith(
        f"began at step 0 with the weights of {earlier}/checkpoints/step-00000004, step 4, "
    )
    assert len(straight[1]) == 8 and straight[1][0][2] == source[1][1][0][2]  # the schedule's first learning rate
    assert straight[1][0][0] not in [loss for loss, _, _ in source[1][1]]  # other weights than those of the seed
    killed(gloo, tmp_path / "new", path | {"kill": 1})
    killed(gloo, tmp_path / "new", path | {"kill": 3})
    [told] = gloo(1, life, tmp_path / "new", path)
    assert line(told).startswith("resumed after step 2 of 8") and told[1] == straight[1][2:]


TORN = [  # in the save of step 4: before its manifest is written, before its last rename, after it
    (("_manifest", 2), "step-00000004.partial", 2),
    (("_synchronise", 3), "step-00000004.partial", 2),
    (("_synchronise", 4), "step-00000004", 4),
]


@pytest.mark.fault("kill in a save")
@pytest.mark.parametrize("torn, left, step", TORN)
def test_a_run_killed_in_a_save_goes_on_exactly(
    gloo: Any, source: tuple[Path, Told], tmp_path: Path, torn: tuple[str, int], left: str, step: int
) -> None:
    run, saved = tmp_path / "run", tmp_path / "run" / "checkpoints"
    killed(gloo, run, {"torn": torn})
    assert sorted(path.name for path in saved.iterdir()) == ["step-00000002", left]
    [told] = gloo(1, life, run, {})
    assert line(told).startswith(f"resumed after step {step} of 8") and told[1] == source[1][1][step:]
    assert sorted(path.name for path in saved.iterdir()) == [f"step-{step:08d}" for step in (2, 4, 6, 8)]


@pytest.mark.fault("flipped bit and kill")
def test_a_flipped_bit_and_a_kill_cost_one_checkpoint(gloo: Any, source: tuple[Path, Told], tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed(gloo, run, {"kill": 5})
    file = flip(run / "checkpoints" / "step-00000004")
    [told] = gloo(1, life, run, {})
    assert f"step-00000004 is damaged and is now step-00000004.damaged: {file} was changed" in told[0]
    assert line(told).startswith("resumed after step 2 of 8") and told[1] == source[1][1][2:]


def test_a_damaged_newest_is_told_and_the_previous_one_goes_on(
    gloo: Any, source: tuple[Path, Told], earlier: Path
) -> None:
    path = earlier / "checkpoints" / "step-00000004"
    file = flip(path)
    ranks = gloo(2, life, earlier, {"train__steps": 3})
    said = ranks[0][0]
    assert f"{path} is damaged and is now step-00000004.damaged: {file} was changed after it was written" in said
    assert (
        "resumed after step 2 of 3" in said
        and "written on 1 rank; changed since: ranks 1 -> 2, train.steps 8 -> 3" in said
    )
    assert not path.exists() and path.with_name("step-00000004.damaged").exists()


def test_what_changed_is_told_with_the_learning_rate(gloo: Any, earlier: Path) -> None:
    changes = {"optimizer__lr": 0.02, "data__seed": 3, "train__z_loss": 0.0, "train__steps": 5}
    [told] = gloo(1, life, earlier, changes)
    assert line(told) == (
        f"resumed after step 4 of 5: {earlier}/checkpoints/step-00000004, written on 1 rank; changed since: optimizer.lr 0.01 -> 0.02, "
        "train.steps 8 -> 5, learning rate of step 5 0.002 -> 0.004, data.seed 0 -> 3, train.z_loss 0.001 -> 0.0"
    )  # the engine's schedule: lr / (1 + steps)


# ---- weights of Megatron's engine


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, as torch reads it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(path)
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def masters_of(path: Path) -> dict[str, torch.Tensor]:
    """fp32 parameters by key: the optimizer's copies, where there are any, else the parameters."""
    found = stored(path)
    parameters = {
        key: value for key, value in found.items() if not key.startswith("optimizer.") and "_extra" not in key
    }
    copies = {
        key: found[name]
        for key in parameters
        for name in (f"optimizer.state.param.{key}", f"optimizer.state.fp32_param.{key}")
        if name in found
    }
    return parameters | copies


def begun(rank: int, world_size: int, source: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """How far the parameters and fp32 copies of a run that begins with stored weights are from these; its optimizer and schedule."""
    from lsys.config.schema import Checkpoint

    with resuming.engine_of(rank, world_size, changes) as engine:
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        from lsys.model.parameters import pieces
        from lsys.train.start import begin

        asked = {"checkpoint": Checkpoint(weights=source)}
        start = begin(engine.settings.model_copy(update=asked), engine)
        known, seen, copies = masters_of(source), set(), 0
        for chunk in engine.chunks:
            for piece in pieces(chunk.module):
                assert torch.equal(piece.data, known[piece.key][piece.slices].to(piece.data.dtype)), piece.key
                seen.add(piece.key)
            parameters = {each.data_ptr(): each for each in chunk.module.parameters()}
            for entry in chunk.module.sharded_state_dict().values():
                parameter = parameters.get(entry.data.data_ptr()) if isinstance(entry.data, torch.Tensor) else None
                if parameter is None or getattr(parameter, "main_param", None) is None:
                    continue
                whole, part = torch.full(parameter.shape, torch.nan), slice(None)
                for each in engine.optimizer.chained_optimizers:
                    if getattr(parameter, "main_param_sharded", False):
                        held = each._get_model_param_range_map(parameter)["param"]
                        part = slice(held.start, held.end)
                whole.view(-1)[part] = parameter.main_param.view(-1)
                one = isinstance(entry, ShardedTensor)
                for made in (
                    [entry] if one else entry.build_fn(entry.key, whole, entry.replica_id, entry.flattened_range)
                ):
                    place = tuple(slice(o, o + n) for o, n in zip(made.global_offset, made.local_shape, strict=True))
                    data = (whole if one else made.data).view(known[made.key][place].shape)
                    here = ~data.isnan()
                    assert torch.equal(data[here], known[made.key][place][here]), made.key
                    copies += int(here.sum())
        states = [state for each in engine.optimizer.chained_optimizers for state in each.optimizer.state.values()]
        first = resuming.Seen()
        resuming.advance(engine, 0, 1, first)
        return {
            "start": (start.step, *start.lines), "keys": seen, "copies": copies, "states": states, "loss": first.losses,
            "steps": engine.scheduler.num_steps,
        }  # fmt: skip


def trained(rank: int, world_size: int, changes: dict[str, Any], folder: Path) -> list[float]:
    """A checkpoint after two steps; the loss of the first batch with its weights."""
    from lsys.checkpoint import Checkpoints

    with resuming.engine_of(rank, world_size, changes) as engine:
        resuming.advance(engine, 0, 2, resuming.Seen())
        with engine.settled_parameters():
            Checkpoints(folder, 1).save(engine, resuming.cursor_of(engine, 2))
        again = resuming.Seen()
        resuming.advance(engine, 0, 1, again)
        return again.losses


BF16 = {"train__precision": "bf16"}
PLAIN = {"optimizer__distributed": False}
WEIGHTS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "fp32 to TP2": ({}, 2, {"parallel__tensor": 2}),
    "bf16 to DP2": (BF16, 2, BF16),
    "bf16, plain, to distributed TP2": (BF16 | PLAIN, 2, BF16 | {"parallel__tensor": 2}),
    "bf16 to plain PP2xVPP2": (BF16, 2, BF16 | PLAIN | {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "fp32, plain, to bf16": (PLAIN, 1, BF16),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_are_the_stored_fp32_ones_bit_for_bit(gloo: Any, tmp_path: Path, case: str) -> None:
    before, ranks, after = WEIGHTS[case]
    [known] = gloo(1, trained, before, tmp_path)
    path = tmp_path / "step-00000002"
    found = gloo(ranks, begun, path, after)
    masters = masters_of(path)
    if before.get("train__precision") == "bf16":  # else nothing tells copies from parameters
        assert any(not torch.equal(each, each.bfloat16().float()) for each in masters.values())
        assert "fp32 copies of the weights" in found[0]["start"][1]
    assert set().union(*(each["keys"] for each in found)) == masters.keys()
    for each in found:
        assert each["start"][0] == 0 and each["states"] == [] and each["steps"] == 1
        assert each["loss"] == pytest.approx(known, rel=1e-5 if before == after == {} else 2e-2)
    numbers = sum(each.numel() for each in masters.values())
    if after.get("train__precision") == "bf16":
        assert sum(each["copies"] for each in found) >= numbers


def unfit(rank: int, world_size: int) -> tuple[str, bool]:
    """What beginning raises, where rank 1 alone finds that the checkpoint does not fit; and whether anything is loaded."""
    from lsys.checkpoint import CheckpointError
    from lsys.checkpoint.agreed import Chosen
    from lsys.checkpoint.choice import Plan
    from lsys.train import start

    def fitting(*_: Any, **__: Any) -> None:
        if rank == 1:
            raise CheckpointError("it has 3 layers, this model 2")

    chosen, loaded = Chosen(Plan(Path("runs/a/step-00000007")), mock.Mock()), mock.Mock()
    changed: dict[str, Any] = {
        "choose": lambda *_: chosen,
        "fitting": fitting,
        "load_verified": loaded,
        "_resume_line": mock.Mock(),
    }
    with mock.patch.multiple(start, **changed), pytest.raises(CheckpointError) as caught:
        start.begin(mock.Mock(), mock.Mock())
    return str(caught.value), loaded.called


def test_a_checkpoint_that_does_not_fit_is_loaded_by_no_rank(gloo: Any) -> None:
    for said, is_loaded in gloo(2, unfit):
        assert "checkpoint runs/a/step-00000007 not loaded: " in said and "it has 3 layers, this model 2" in said
        assert not is_loaded
