"""Whether a run has done all its steps, known from its newest checkpoint before anything is started."""

from __future__ import annotations

from lsys.config import Config
from lsys.runtime.environment import Launch


def finished_step(settings: Config, launch: Launch) -> int | None:
    """The step of the checkpoint that the run would go on from, if no step is left; None if one is, or if it takes more to know.

    Such as on several nodes: a listing of the folder may be older on one of them, and all ranks must go the same way.
    """
    found = sorted((settings.train.folder / "checkpoints").glob("step-*"))
    if not found or launch.world_size != launch.local_world_size or settings.checkpoint.resume != "auto":
        return None
    from lsys.checkpoint.compatible import differences
    from lsys.checkpoint.manifest import CheckpointError, Manifest

    try:
        manifests = [Manifest.read(path) for path in found]
        if any(manifest.incomplete(path) for manifest, path in zip(manifests, found, strict=True)):
            return None
    except (OSError, CheckpointError):  # the run that starts says what is wrong
        return None
    cursor = max(manifests, key=lambda manifest: manifest.serial).cursor
    return cursor.step if cursor.step >= settings.train.steps and not differences(cursor.config, settings) else None
