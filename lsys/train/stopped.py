"""The marker of a run that stopped for a reason that a restart would meet again; torch-free, so that a restart ends at once."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lsys.runtime.job import Job
from lsys.train.errors import RunError

NAME = "stopped.json"  # in the run's folder
EXIT_CODE = 3


class StoppedError(RunError):
    """Updates were not finite, `train.skip_limit` times in a row, in this start or in the one that a launcher restarts."""

    exit_code = EXIT_CODE


@dataclass(frozen=True)
class Marker:
    """Why a run stopped, and which start of it."""

    reason: str
    job: Job

    def write(self, folder: Path) -> None:
        """Into `folder`, whole or not at all. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{NAME}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"reason": self.reason, "job": self.job.to_tree()}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder / NAME)

    @classmethod
    def read(cls, folder: Path) -> "Marker | None":
        """None where there is none, or none that can be read."""
        try:
            tree = json.loads((folder / NAME).read_text(encoding="utf-8"))
            return cls(str(tree["reason"]), Job.from_tree(tree["job"]))
        except (OSError, ValueError, LookupError, TypeError):
            return None


def refuse_restart(folder: Path, job: Job) -> None:
    """Raise StoppedError, in the words of the stop, where a launcher restarts the start that stopped."""
    marker = Marker.read(folder)
    if marker is not None and job.is_restart_of(marker.job):
        raise StoppedError(marker.reason)


def clear(folder: Path) -> str:
    """Remove the marker of an earlier start, if there is one; what is to be said of it, or nothing. The first rank calls it."""
    marker, path = Marker.read(folder), folder / NAME
    if not path.exists():
        return ""
    path.unlink(missing_ok=True)
    return f"{path} is removed, since this is a new start; an earlier one {marker.reason if marker else 'left it'}"
