"""What the ranks of `bench/faults.py` run, in workers of the tests' pool, which know nothing of bench: functions of (rank, ranks, ...)."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support import parity, planting, stale
from support.delays import StubData

STEPS, EVERY = 6, 2  # of a run of random documents, and of its checkpoints
TINY = {
    "model__pattern": "S", "model__layers": 2, "model__hidden": 16, "model__heads": 2, "model__groups": 2, "model__ffn": 16,
    "optimizer__schedule": "constant", "optimizer__warmup_steps": 0, "data__validation_fraction": 0.0,
}  # fmt: skip


def settings(folder: Path, changes: dict[str, Any], every: int = EVERY) -> Any:
    """A configuration of the tests, changed, whose run is in this folder."""
    from lsys.config.schema import Checkpoint, Metrics

    config = parity.settings(**{"train__folder": folder, "train__steps": STEPS} | changes)
    metrics = Metrics(every=1, waterfall_every=0, tensorboard=False)
    return config.model_copy(update={"metrics": metrics, "checkpoint": Checkpoint(every=every, keep=9)})


@contextlib.contextmanager
def groups_of(rank: int, world_size: int, config: Any) -> Iterator[Any]:
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    with mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None):
        with process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups:
            yield groups


def digest(engine: Any) -> str:
    """SHA-256 of the rank's parameters."""
    from lsys.model.parameters import pieces

    found = hashlib.sha256()
    with engine.settled_parameters():
        for chunk in engine.chunks:
            for piece in pieces(chunk.module):
                found.update(piece.key.encode() + piece.data.contiguous().numpy().tobytes())
    return found.hexdigest()


# ---- checkpoints that are damaged, or seen otherwise


def written(rank: int, world_size: int, folder: Path) -> dict[int, str]:
    """A run; the digest of the rank's parameters at each of its checkpoints."""
    from lsys.train.run import Run

    config = settings(folder, {})
    with groups_of(rank, world_size, config) as groups, mock.patch("lsys.train.data.open_data", StubData):
        run, digests = Run(config, groups), dict[int, str]()
        save = run.checkpoints.save

        def saved(engine: Any, cursor: Any) -> Path:
            digests[cursor.step] = digest(engine)
            return save(engine, cursor)

        with mock.patch.object(run.checkpoints, "save", saved), contextlib.redirect_stdout(io.StringIO()):
            run.train()
        return digests


def begun(rank: int, world_size: int, runs: list[Path], views: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """How starts in folders with checkpoints end: `step` and `digest` of what was loaded and `lines` that tell of it, or the `error`.

    Args:
        views: for each folder, (rank, kind, file): whose filesystem shows the newest checkpoint otherwise, see `support.stale`; kind "": nobody's.
    """
    from lsys.checkpoint import CheckpointError, agreed
    from lsys.train.engine import Engine
    from lsys.train.start import begin

    found: list[dict[str, Any]] = []
    name, older = f"step-{STEPS:08d}", f"step-{STEPS - EVERY:08d}"
    with groups_of(rank, world_size, settings(runs[0], {})) as groups:
        engine = Engine(settings(runs[0], {}), groups)
        for run, (where, kind, file) in zip(runs, views, strict=True):
            with torch.no_grad():
                for parameter in (each for chunk in engine.chunks for each in chunk.parameters()):
                    parameter.fill_(7.0)  # of no checkpoint
            shown = stale.view(kind, name, file=file, older=run / "checkpoints" / older) if kind else None
            with mock.patch.object(agreed, "VISIBLE_SECONDS", 1.0), contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # that damages are told at once
                if shown and rank == where:
                    stack.enter_context(shown)
                try:
                    start = begin(settings(run, {}), engine)
                    found.append({"step": start.step, "digest": digest(engine), "lines": start.lines})
                except CheckpointError as error:
                    found.append({"error": str(error)})
    return found


# ---- numbers that are not finite


def not_finite(rank: int, world_size: int, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A run with one planted at a step: the `name` of what it was planted into, what was `said`, and the exit code.

    Args:
        case: `changes` of the configuration; `step`; `rank`; `value`; `module`, in whose output it is, or `parameter`, in whose gradient.
    """
    from lsys.train.engine import Engine
    from lsys.train.errors import RunError
    from lsys.train.run import Run

    names: list[str] = []

    def engine_of(config: Any, groups: Any) -> Any:
        engine, what = Engine(config, groups), dict(step=case["step"], rank=case["rank"], value=case["value"])
        if case["module"]:
            names.append(planting.plant_output(engine, module=case["module"], **what))
        else:
            names.append(planting.plant(engine, parameter=case["parameter"], **what))
        return engine

    config, said, error = settings(folder, case["changes"]), io.StringIO(), None
    with groups_of(rank, world_size, config) as groups, mock.patch("lsys.train.data.open_data", StubData):
        with contextlib.redirect_stdout(said):
            try:
                Run(config, groups, make_engine=engine_of).train()
            except RunError as raised:
                error = raised
    return {
        "name": names[0],
        "said": said.getvalue(),
        "error": str(error or ""),
        "code": getattr(error, "exit_code", 0),
    }


# ---- bits that flip


def flipped(rank: int, world_size: int, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A run in which one rank's memory changes by a bit at a step: the `name` of what it is part of, how the run ended (`error`), and the exit code.

    Args:
        case: `changes` of the configuration; `step`; `rank`; `what` (see `_flip`), the place of its `tensor` among those that other ranks
            hold too, of the `word` in it, and the `bit`, modulo how many there are.
    """
    from lsys.checkpoint.replicas import ReplicaError
    from lsys.train.engine import Engine
    from lsys.train.run import Run

    names: list[str] = []

    def engine_of(config: Any, groups: Any) -> Any:
        engine = Engine(config, groups)
        attribute = "forward_backward" if case["what"] == "forward" else "step"
        original, done = getattr(engine, attribute), 1 if case["what"] == "forward" else 0

        def flipping(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            if rank == case["rank"] and engine.scheduler.num_steps + done == case["step"] and not names:
                names.append(_flip(engine, case))
            return result

        setattr(engine, attribute, flipping)
        return engine

    config, error = settings(folder, case["changes"]), None
    with groups_of(rank, world_size, config) as groups, mock.patch("lsys.train.data.open_data", StubData):
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                Run(config, groups, make_engine=engine_of).train()
            except ReplicaError as raised:
                error = raised
    return {"name": "".join(names), "error": str(error or ""), "code": getattr(error, "exit_code", 0)}


def _flip(engine: Any, case: dict[str, Any]) -> str:
    """Flip a bit of a "parameter" that other ranks hold too, of its fp32 "master", of a moment of Adam's, or ("forward") of a parameter that
    another rank updates; its name in a checkpoint."""
    from lsys.train.origin import parameters

    what, owned = case["what"], {name: each for _, name, each in parameters(engine.chunks)}
    if what == "forward":
        owned = {name: each for name, each in owned.items() if _is_of_others(engine, each)}
    elif engine.settings.parallel.tensor > 1:
        owned = {name: each for name, each in owned.items() if not getattr(each, "tensor_model_parallel", False)}
    name = sorted(owned)[case["tensor"] % len(owned)]
    tensor, key = owned[name], name
    if what not in ("parameter", "forward"):
        master = getattr(tensor, "main_param", tensor)
        (states,) = [
            each.optimizer.state for each in engine.optimizer.chained_optimizers if master in each.optimizer.state
        ]
        tensor, key = (master, f"fp32_param.{name}") if what == "master" else (states[master][what], f"{what}.{name}")
    words = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32}[tensor.itemsize])
    words[case["word"] % len(words)] ^= 1 << case["bit"]
    return key


def _is_of_others(engine: Any, parameter: torch.Tensor) -> bool:
    """Whether the distributed optimizer of other ranks updates all of a parameter: each bucket is cut into equal parts, one for each rank."""
    group = engine.groups.collection.dp_cp
    (buffer,) = [each for each in engine.chunks[0].buffers if parameter in each.param_index_map]
    begin, end, number = buffer.param_index_map[parameter]
    bucket = buffer.buckets[number]
    size = bucket.grad_data.numel() // group.size()
    own = bucket.offset + group.rank() * size
    return bool(end <= own or begin >= own + size)


# ---- sizes and degrees that change


def read(rank: int, world_size: int, folder: Path, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One start of a run over the corpus of a folder: the `tokens` that the rank was given and nobody else counts, `seen` at its end."""
    from lsys.observe.reporter import Reporter
    from lsys.train.corpora import open_corpora
    from lsys.train.run import Run

    corpora = {"data__corpora": [{"path": str(folder / "corpus")}], "train__steps": steps}
    config = settings(folder / "run", TINY | corpora | changes, every=0)
    tokens: list[int] = []
    seen: list[int] = []
    step = Run._train_step

    def counted(self: Any, batches: list[Any], flops: float) -> Any:
        tokens.extend(token for batch in batches for token in batch.tokens[: len(batch.loss_mask)].tolist())
        return step(self, batches, flops)

    def training(self: Any, step: int, interval: Any, values: Any, waterfall: Any = None) -> None:
        seen.append(values["n_tokens_seen"])

    with contextlib.ExitStack() as stack:
        groups = stack.enter_context(groups_of(rank, world_size, config))
        stack.enter_context(mock.patch.object(Run, "_train_step", counted))
        stack.enter_context(mock.patch.object(Reporter, "training", training))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        Run(config, groups, corpora=open_corpora(config, is_first=not rank)).train()
        ranks = groups.collection
        is_copy = ranks.tp.rank() > 0 or ranks.pp.rank() > 0
    return {"tokens": [] if is_copy else tokens, "seen": seen[-1] if seen else 0}
