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


def has_other_curves(config: Config) -> bool:
    """Whether the folder has the curves of a run with another configuration."""
    found = _marked(config)
    return found is not None and found != config_hash(config)


def require_own_folder(config: Config, goes_on: bool = False) -> None:
    """Refuse to start a run where another one has left its curves: TensorBoard would show both as one.

    Args:
        goes_on: whether the run goes on from a checkpoint of its folder, so that its configuration may have changed, or sets aside what is there.

    Raises:
        FolderError: names the folder.
    """
    if config.metrics.tensorboard and not goes_on and has_other_curves(config):
        raise FolderError(
            f"train.folder {config.train.folder} has the curves of another run (configuration {(_marked(config) or '')[:12]}, this is "
            f"{config_hash(config)[:12]}) and no checkpoint to go on from: take another train.folder, or checkpoint.resume scratch, which sets "
            "the curves aside"
        )


def _marked(config: Config) -> str | None:
    """The hash of the configuration whose curves the folder has; None if it has none."""
    try:
        return str(json.loads((tensorboard_folder(config) / NAME).read_text())["config"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return "unreadable"


def mark_folder(config: Config) -> None:
    """Say whose curves the folder holds; the first rank calls it."""
    marker = tensorboard_folder(config) / NAME
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"config": config_hash(config)}) + "\n")
