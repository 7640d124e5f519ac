"""The weights of a checkpoint alone, into a model of one process, whatever degrees of parallelism they were written at."""

from pathlib import Path
from typing import Any

from lsys.checkpoint import storage
from lsys.checkpoint.agreement import RankFailure
from lsys.checkpoint.manifest import NAME, CheckpointError, Manifest
from lsys.checkpoint.store import Checkpoints
from lsys.runtime.groups import Groups


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's folder: `path` itself, or the newest whole one of a run's folder.

    Raises:
        CheckpointError: neither.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / NAME).exists():
            return folder
        if (newest := Checkpoints(folder, 1).latest()) is not None:
            return newest
    raise CheckpointError(
        f"{path} is no checkpoint, and no run's folder with a whole one; give train.folder, or a step-* folder in it"
    )


def load_weights(model: Any, groups: Groups, path: Path, manifest: Manifest) -> None:
    """Verify the files and load the weights.

    Args:
        model: a whole `HybridModel`, one chunk of all layers.

    Raises:
        CheckpointError: a file is missing or changed, a tensor missing or of another shape, or a pickle holds more than a
            checkpoint needs.
    """
    manifest.verify(path, sorted(manifest.files))
    try:
        state = {"model0": model.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})}
        loaded = storage.read(state, path, manifest.files)
    except RankFailure as failure:
        raise CheckpointError(f"checkpoint {path} not loaded: {failure.messages}") from failure
    model.load_state_dict(loaded["model0"], strict=True)
