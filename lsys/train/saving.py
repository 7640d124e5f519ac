"""When a run saves, and what it does where a save fails."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lsys.checkpoint.agreement import RankFailure
from lsys.checkpoint.manifest import CheckpointError

if TYPE_CHECKING:
    from lsys.train.run import Run

# Seconds between the attempts at the last save; together less than the 30 from torchrun's SIGTERM to SIGKILL.
PAUSES = (1.0, 3.0, 8.0)


class Saves:
    """The saves of a run: it goes on without one at an interval, and does not end well without the last.

    A save fails alike on all ranks, so all of them count, wait and end alike.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.failures = run, 0

    def at_interval(self) -> None:
        """Save (collective). A failure is told, and the next interval saves again.

        Raises:
            CheckpointError: `checkpoint.give_up` of them have failed, one after another.
        """
        try:
            self.run.save()
        except (CheckpointError, RankFailure) as error:
            self.failures += 1
            self.run.updates.save_is_due = False  # the next interval is soon enough
            most = self.run.settings.checkpoint.give_up
            if self.failures == most:
                raise CheckpointError(
                    f"{error}; {_times(self.failures)} failed one after another, as many as checkpoint.give_up allows: the run stops"
                ) from error
            left = f"{most - self.failures} more may fail (checkpoint.give_up)" if most else "checkpoint.give_up is 0"
            self.run.reporter.say(
                f"warning: {error}; training goes on, and the next interval saves again; {_times(self.failures)} failed, {left}"
            )
        else:
            if not self.run.updates.save_is_due:  # else it was left out
                self.failures = 0

    def at_end(self) -> None:
        """Save what is not saved yet, as no step follows (collective). A failure is told, and it is tried again after a pause.

        Raises:
            CheckpointError: no attempt did.
        """
        for pause in (*PAUSES, None):
            try:
                return self.run.save()
            except (CheckpointError, RankFailure) as error:
                if pause is None:
                    raise CheckpointError(
                        f"{error}; this was the last save of the run, in {1 + len(PAUSES)} attempts: the steps since are lost"
                    ) from error
                self.run.reporter.say(f"warning: {error}; it is the last save, and tried again in {pause:g} s")
            time.sleep(pause)


def _times(count: int) -> str:
    return f"{count} save{'s' * (count > 1)}"
