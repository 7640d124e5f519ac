"""A polite end: SIGTERM asks the run to save and stop after the current step."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from lsys.runtime.lock import LostError

LOST = 2  # above a request to stop


class StopRequest:
    """Context manager that turns SIGTERM, however often it comes, into a question asked between steps.

    Args:
        is_lost: whether this rank lost the run's folder to another run.
    """

    def __init__(self, device: torch.device, is_lost: Callable[[], bool] = lambda: False) -> None:
        self.device, self.is_lost, self.received = device, is_lost, False

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks.

        Raises:
            LostError: on all ranks, if one lost the run's folder: nothing that the run does from now on may be kept.
        """
        flag = torch.tensor(LOST if self.is_lost() else int(self.received), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() == LOST:
            raise LostError(
                "train.folder is no longer this run's: another run has taken it over while this one did not answer"
            )
        return bool(flag.item())


def heed_until(is_done: Callable[[], bool]) -> None:
    """From now on SIGTERM ends the process as ever, but not once the work is done: it would make a failure of a good end."""

    def receive(number: int, frame: FrameType | None) -> None:
        if not is_done():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, receive)
