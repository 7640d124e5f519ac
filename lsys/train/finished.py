"""Whether a run has done all its steps, known from its newest checkpoint before anything is started."""

from __future__ import annotations

from lsys.checkpoint.choice import look
from lsys.checkpoint.compatible import differences
from lsys.checkpoint.manifest import CheckpointError
from lsys.checkpoint.starts import AUTO, FOLDER
from lsys.config import Config
from lsys.runtime.environment import Launch


def finished_step(settings: Config, launch: Launch) -> int | None:
    """The step of the checkpoint that the run would go on from, if no step is left; None if one is, or if it takes more to know.

    Such as on several nodes: a listing of the folder may be older on one of them, and all ranks must go the same way.
    """
    if launch.world_size != launch.local_world_size or settings.checkpoint.resume != AUTO:
        return None
    try:
        found = look(settings.train.folder / FOLDER)
    except CheckpointError:  # the run that starts says what is wrong
        return None
    if not found.whole or found.passed_over:
        return None
    *_, newest = found.whole.values()
    cursor = newest.cursor
    return cursor.step if cursor.step >= settings.train.steps and not differences(cursor.config, settings) else None
