"""The weights of a checkpoint alone, whatever degrees of parallelism they were written at."""

from pathlib import Path
from typing import Any

from lsys.checkpoint import storage
from lsys.checkpoint.agreement import RankFailure, agree
from lsys.checkpoint.held import Held
from lsys.checkpoint.manifest import CheckpointError, Manifest
from lsys.runtime.groups import Groups


def take_weights(engine: Held, path: Path, manifest: Manifest) -> bool:
    """Load the weights of a verified checkpoint into a new engine, of any degrees (collective).

    Returns:
        Whether they are the fp32 copies of the optimizer that wrote them.

    Raises:
        CheckpointError: on all ranks: a tensor is missing or of another shape, or a pickle holds more than a checkpoint needs.
    """
    try:
        stored = agree(lambda: storage.keys(path, manifest.files))
        state = agree(lambda: engine.weights_state(stored))
        asked = {
            getattr(entry, "key", "") for part in state.values() if isinstance(part, dict) for entry in part.values()
        }
        loaded = storage.read(state, path, manifest.files)
        agree(lambda: engine.load_weights(loaded))
    except RankFailure as failure:
        raise CheckpointError(f"weights of checkpoint {path} not loaded: {failure.messages}") from failure
    return any(key.startswith(storage.STATES) for key in asked)


def load_weights(model: Any, groups: Groups, path: Path, manifest: Manifest) -> None:
    """Verify the files and load the weights into a model of one process.

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
