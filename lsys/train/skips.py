"""What becomes of the updates of a run: those that are left out are told and counted, too many in a row stop it; spikes are told."""

from __future__ import annotations

import contextlib
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from lsys.checkpoint.agreement import RankFailure, agree_on_first
from lsys.checkpoint.manifest import CheckpointError
from lsys.runtime.job import job_from_environment
from lsys.train.errors import REMEDY, RunError
from lsys.train.finite import first_not_finite
from lsys.train.observers import StepObserver
from lsys.train.stopped import NAME, Marker, StoppedError

if TYPE_CHECKING:
    from lsys.train.observers import StepDone
    from lsys.train.protocol import Losses, Update
    from lsys.train.run import Run

SPIKE = 10.0  # times the median of the norms before
WINDOW, ENOUGH = 64, 16  # norms that the median is of, and how many there have to be


class UnsavedError(RunError):
    """A run ends without a checkpoint of its last step."""

    exit_code = 1


class Updates:
    """The updates of a run.

    Attributes:
        skipped: how many were left out, over all starts of the run. in_a_row: of them, the last ones without one that was made.
        save_is_due: whether a save was left out, and is to be made after the next step that is finite.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.skipped, self.in_a_row, self.save_is_due, self.last = say, 0, 0, False, ""
        self._norms: deque[float] = deque(maxlen=WINDOW)  # of this start

    def note(self, step: int, losses: Losses, update: Update, origin: str) -> None:
        """Count a step's update, and tell what is out of order with it.

        Args:
            origin: of what is not finite, where the update was not made.
        """
        if not losses.tokens:
            self.say(f"step {step}: no target counts, all are masked: there is no loss, and no point of its curve")
        if update.applied:
            self.in_a_row, self.last = 0, ""
            self._look_for_a_spike(step, update.norm)
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.last = f"the update of step {step} was not made: {origin}"
        self.say(
            f"step {step}: no update was made: {origin} (loss {losses.mean:.4g}, gradient norm {update.norm:.4g}); "
            f"{self.in_a_row} in a row, {self.skipped} in all"
        )

    def _look_for_a_spike(self, step: int, norm: float) -> None:
        if len(self._norms) >= ENOUGH:
            median = statistics.median(self._norms)
            if norm > SPIKE * median:
                times = f"{norm / median:.3g} times the median" if median else "and the median is 0"
                self.say(
                    f"step {step}: a spike: the gradient norm is {norm:.4g}, {times} of the last {len(self._norms)} steps ({median:.4g})"
                )
        self._norms.append(norm)

    def refusal(self, numbers: Iterator[tuple[str, Tensor]]) -> str:
        """Why no checkpoint may be written now, equal on all ranks; empty: it may (collective). `numbers`: of this rank, to be saved."""
        if self.last:
            return self.last
        found: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(found, first_not_finite(numbers))
        return next((f"{name} is not finite on rank {rank}" for rank, name in enumerate(found) if name), "")


def newest(run: Run) -> str:
    """The newest checkpoint, for a message (collective)."""
    try:
        return str(agree_on_first(run.checkpoints.latest))
    except RankFailure as failure:
        return f"unknown ({failure.messages})"


def save_left_out(run: Run, why: str) -> None:
    """Tell that a save is left out; at the end of the run, raise UnsavedError. Where numbers are not finite though the update was, CheckpointError:
    such a save fails until somebody looks."""
    updates, there = run.updates, newest(run)
    updates.save_is_due = True
    text = f"no checkpoint of step {run.step} is written: {why}"
    if run.is_ending:
        raise UnsavedError(f"{text}. The run ends without it; the newest checkpoint is {there}; {REMEDY}")
    if not updates.last:
        raise CheckpointError(f"{text}; the newest is {there}")
    updates.say(f"{text}. It is written after the next step that is finite; the newest is {there}")


class Limit(StepObserver):
    """Stops the run after `train.skip_limit` updates in a row that were not made; a launcher's restart of it stops at once."""

    required = True

    def __init__(self, run: Run) -> None:
        self.run = run

    def end_step(self, done: StepDone) -> None:
        updates, settings = self.run.updates, self.run.settings
        limit, folder = settings.train.skip_limit, settings.train.folder
        if updates.in_a_row < limit:
            return
        reason = (
            f"stopped after step {done.step}: {limit} updates in a row were not made (train.skip_limit), and a restart would meet the same. "
            f"At last {updates.last}. The newest checkpoint is {newest(self.run)}; {REMEDY}. "
            f"A start of yours goes on from there; where it has the --rdzv-id or --job of this one, remove {folder / NAME} before"
        )
        with contextlib.suppress(RankFailure):  # a full disk: then a restart tries, and finds the same
            agree_on_first(lambda: Marker(reason, job_from_environment()).write(folder))
        raise StoppedError(reason)
