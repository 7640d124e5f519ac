"""A polite end: SIGTERM asks the run to save and stop after the current step."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class StopRequest:
    """Context manager that turns SIGTERM, however often it comes, into a question asked between steps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.received = device, False

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
        """Whether any rank was asked to stop; the same answer on all ranks."""
        flag = torch.tensor(int(self.received), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def heed_until(is_done: Callable[[], bool]) -> None:
    """From now on SIGTERM ends the process as ever, but not once the work is done: it would make a failure of a good end."""

    def receive(number: int, frame: FrameType | None) -> None:
        if not is_done():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, receive)
