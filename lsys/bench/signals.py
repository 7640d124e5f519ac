"""A job of several processes, started from here: how it is waited for, stopped and ended."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 60.0  # to save a checkpoint and to stop
ENDING_SECONDS = 5.0  # for what is left of a job, between SIGTERM and SIGKILL


class Signals:
    """SIGINT, SIGTERM and SIGHUP ask the job to save and stop; a second one, or none to ask, leaves at once.

    Attributes:
        asked: the signal that the job was asked to stop with, or 0.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.asked = 0
        self._starting = False

    def __enter__(self) -> "Signals":
        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has SIGHUP
        self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._starting and (self.process is None or self.asked):
            raise SystemExit(128 + number)
        self.asked = self.asked or number
        print("stopping the job; once more to end it at once", file=sys.stderr, flush=True)
        if self.process is not None:
            self.process.terminate()

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Start a command as Popen does, in a session of its own, and wait for it; nothing of its process group is left."""
        process, self._starting = None, True  # a signal meanwhile must not lose the process
        try:
            # In a session of its own: a terminal's Ctrl-C is passed on once, by us.
            process = subprocess.Popen(command, start_new_session=True, **options)
            self.process, self._starting = process, False
            if self.asked:
                process.terminate()
            return self.wait(process)
        finally:
            self._starting = False
            if process is not None:
                end_group(process)

    def wait(self, process: subprocess.Popen, log: Path | None = None) -> int:
        """Show the log while the process runs; its exit code, or that of the signal that ended it."""
        self.process, end = process, float("inf")
        with log.open("rb") if log else io.BytesIO() as console:
            running = True
            while running and time.monotonic() < end:
                time.sleep(0.1)
                running = process.poll() is None
                sys.stdout.write(console.read().decode(errors="replace"))
                sys.stdout.flush()
                if self.asked and end == float("inf"):
                    end = time.monotonic() + GRACE_SECONDS
        self.process = None
        return 128 + self.asked if self.asked else process.returncode


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Inside, signals do not interrupt: for what must be put in order in every case."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a process that leads a group, and of its group: SIGTERM, some seconds, SIGKILL."""
    with deaf():
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + ENDING_SECONDS
            if not _sent(process, number):
                return
            while _sent(process, 0):
                if time.monotonic() > end:
                    break
                time.sleep(0.05)


def _sent(process: subprocess.Popen, number: int) -> bool:
    """Whether the group has members that the signal could be sent to."""
    process.poll()  # a leader that has ended is a member until it is asked for
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
