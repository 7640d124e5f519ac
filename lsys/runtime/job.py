"""Whether a start is a person's, or a launcher's restart of one that ended."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NO_ID = "none"  # torchrun's where none was given: alike in all such runs


@dataclass(frozen=True)
class Job:
    """What launchers call this start; alike on all its nodes.

    Attributes:
        run: torchrun's id, equal over the restarts of its workers, and another for each torchrun; empty without one.
        slurm: job and step of Slurm; empty without.
        requeues: how often Slurm has started the job anew.
        restarts: how often torchrun has started the workers anew; nodes may disagree on it.
    """

    run: str = ""
    slurm: str = ""
    requeues: int = 0
    restarts: int = 0

    @property
    def has_id(self) -> bool:
        return bool(self.run or self.slurm)

    def is_restart_of(self, earlier: "Job") -> bool:
        """Whether a launcher made this start from `earlier`, which has ended: torchrun its workers, or Slurm the job."""
        if self.run and self.run == earlier.run:
            return True
        if not self.run and not earlier.run and self.restarts > earlier.restarts:
            return True
        return bool(self.slurm) and self.slurm == earlier.slurm and self.requeues > earlier.requeues

    def to_tree(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "Job":
        """What `to_tree` gave. Raises LookupError, TypeError or ValueError for anything else."""
        return cls(str(tree["run"]), str(tree["slurm"]), int(tree["requeues"]), int(tree["restarts"]))


def job_from_environment(environment: Mapping[str, str] = os.environ) -> Job:
    """The job as the variables of torchrun and Slurm describe it."""
    run = environment.get("TORCHELASTIC_RUN_ID", "")
    job, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "")
    return Job(
        "" if run == NO_ID else run,
        f"{job}.{step}" if job else "",
        _count(environment, "SLURM_RESTART_COUNT"),
        _count(environment, "TORCHELASTIC_RESTART_COUNT"),
    )


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 0
