"""The folder of a run's curves belongs to one run."""

import json
from pathlib import Path

from lsys.config import Config
from lsys.config.load import config_hash

NAME = "run.json"


class FolderError(ValueError):
    """The folder has another run's curves; every rank finds the same."""

    everywhere = True


def tensorboard_folder(config: Config) -> Path:
    return config.train.folder / "tensorboard"


def require_own_folder(config: Config) -> None:
    """Refuse to start a run where another one has left its curves: TensorBoard would show both as one.

    A run that goes on from a checkpoint of its folder may have a changed configuration, a run that starts anew may not.

    Raises:
        FolderError: names the folder.
    """
    marker = tensorboard_folder(config) / NAME
    if not config.metrics.tensorboard or _goes_on(config) or not marker.exists():
        return
    try:
        found = str(json.loads(marker.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        found = "unreadable"
    if found != config_hash(config):
        raise FolderError(
            f"train.folder {config.train.folder} has the curves of another run (configuration {found[:12]}, this is "
            f"{config_hash(config)[:12]}) and no checkpoint to go on from: take another train.folder, or remove {marker.parent}"
        )


def mark_folder(config: Config) -> None:
    """Say whose curves the folder holds; the first rank calls it."""
    marker = tensorboard_folder(config) / NAME
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"config": config_hash(config)}) + "\n")


def _goes_on(config: Config) -> bool:
    own, choice = config.train.folder / "checkpoints", config.checkpoint.resume
    if choice == "never":
        return False
    if choice != "auto":
        return Path(choice).resolve().is_relative_to(own.resolve())
    return any(path.name[5:].isdigit() for path in own.glob("step-*"))
