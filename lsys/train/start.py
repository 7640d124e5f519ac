"""How a run begins: which checkpoint all ranks load, and what is told of it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lsys.checkpoint.agreed import Chosen, choose
from lsys.checkpoint.agreement import RankFailure, agree, agree_on_first
from lsys.checkpoint.changes import changes, function_changes, written_on
from lsys.checkpoint.choice import is_own, look, record
from lsys.checkpoint.manifest import CheckpointError, Cursor
from lsys.checkpoint.starts import FOLDER, SCRATCH, Start
from lsys.checkpoint.store import fitting, load_verified
from lsys.checkpoint.weights import take_weights
from lsys.config import Config
from lsys.observe.reporter import RECORD
from lsys.observe.run_dir import has_other_curves, tensorboard_folder
from lsys.train.protocol import TrainingEngine


@dataclass(frozen=True)
class Begun:
    """How a run began.

    Attributes:
        lines: what is told of it.
        record: for `Cursor.extra["start"]`.
        cursor: of the checkpoint that it goes on from; None where it began at step 0. where: that checkpoint's name.
    """

    lines: tuple[str, ...]
    record: list[dict[str, str]]
    cursor: Cursor | None = None
    where: str = ""

    @property
    def step(self) -> int:
        """That are done."""
        return self.cursor.step if self.cursor else 0

    @property
    def kept(self) -> Mapping[str, Any]:
        """What else the checkpoint kept for the loop."""
        return self.cursor.extra if self.cursor else {}

    def extra(self, engine: TrainingEngine) -> dict[str, Any]:
        """What a checkpoint holds of it, and the learning rate that the next step of an engine will have."""
        return {"start": self.record, "lr": engine.learning_rate}


def begin(settings: Config, engine: TrainingEngine, guard: Callable[[], None] = lambda: None) -> Begun:
    """Load what the configuration asks for into a new engine, and set aside what it asks to (collective).

    Args:
        guard: raises where the folder is no longer this run's; the first rank asks it before it renames anything.

    Raises:
        CheckpointError: on all ranks: there is nothing to begin with, it does not fit, or the ranks do not see the same.
    """
    chosen = choose(settings, guard)
    plan, path = chosen.plan, chosen.plan.checkpoint
    lines, cursor = list(chosen.passed), None
    if path is not None and chosen.manifest is not None:
        try:
            agree(lambda: fitting(path, settings, weights=plan.weights))
        except RankFailure as failure:
            raise CheckpointError(f"checkpoint {path} not loaded: {failure.messages}") from failure
        if plan.weights:
            masters = take_weights(engine, path, chosen.manifest)
            lines.append(_weights_line(settings, chosen, masters))
        else:
            load_verified(engine, path, chosen.manifest)
            cursor = chosen.manifest.cursor
            lines.append(_resume_line(settings, chosen, engine.learning_rate))
    if plan.aside:
        try:
            lines += agree_on_first(lambda: set_aside(settings, guard))
        except RankFailure as failure:
            raise CheckpointError(f"nothing was set aside: {failure.messages}") from failure
    return Begun(tuple(lines), record(settings, plan, chosen.digest), cursor, path.name if path else "")


def _resume_line(settings: Config, chosen: Chosen, lr: float) -> str:
    assert chosen.manifest is not None
    manifest, start = chosen.manifest, Start.of(settings)
    found = changes(manifest, settings, dist.get_world_size(), lr)
    line = f"resumed after step {manifest.cursor.step} of {settings.train.steps}: {chosen.plan.checkpoint}, written on {written_on(manifest)}"
    if chosen.plan.goes_on and start.is_once and not is_own(start, settings):
        began = start.resume == SCRATCH or start.weights
        line += f"; {start} was done {'when this run began' if began else 'before, and is done once in a run'}"
    return f"{line}; changed since: {', '.join(found)}" if found else line


def _weights_line(settings: Config, chosen: Chosen, masters: bool) -> str:
    assert chosen.manifest is not None
    found = function_changes(chosen.manifest.cursor.config, settings)
    what = "fp32 copies of the weights" if masters else "weights"
    line = f"began at step 0 with the {what} of {chosen.plan.checkpoint}, step {chosen.manifest.cursor.step}, written on {written_on(chosen.manifest)}"
    return f"{line}; changed since: {', '.join(found)}" if found else line


def set_aside(settings: Config, guard: Callable[[], None] = lambda: None) -> list[str]:
    """Move an earlier run's checkpoints, curves and record into a folder of their own in the run's; what was done, in words.

    The checkpoints go last: a start that is interrupted here does it again, into the same folder.
    """
    run = settings.train.folder
    there = [run / FOLDER] if not look(run / FOLDER).is_empty else []
    if there or has_other_curves(settings):
        there = [tensorboard_folder(settings), run / RECORD, *there]
    if not (there := [path for path in there if path.exists()]):
        return []
    guard()
    count = 1
    while (run / f"before-{count}" / FOLDER).exists():
        count += 1
    target = run / f"before-{count}"
    target.mkdir(exist_ok=True)
    for path in there:
        os.replace(path, _free(target / path.name))
    return [f"checkpoint.resume scratch: {', '.join(path.name for path in there)} of {run} are now in {target}"]


def _free(path: Path) -> Path:
    """The path, or one like it that is not there."""
    count, found = 1, path
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}-{count}")
    return found
