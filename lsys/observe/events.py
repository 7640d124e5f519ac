"""TensorBoard's file of a run, written by the one who calls: an error of the disk is raised there and then, and costs no point.

TensorBoard's own writer has a thread, which ends with the first error. The error shows at a later call, to which it does not
belong, and all points after it are lost.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary as summaries

if TYPE_CHECKING:
    import numpy as np

NUMBERS = itertools.count()  # files of one process are read in the order in which they were made
MOST_WAITING = 32 << 20  # bytes of records that a full disk lets wait in memory; the oldest go first


class EventFile:
    """Records of one TensorBoard run. They wait in memory until `flush` has written them; nothing else touches the disk.

    Args:
        first_step: points of earlier files from this step on are taken back.
        beginning: summaries that each file begins with, also one that takes the place of a file that vanished.
        made: is called before a file is made, when its folder is there.

    Attributes:
        lost: records that were given up, for want of room in memory.
    """

    def __init__(
        self, folder: Path, first_step: int, beginning: Sequence[Any] = (), made: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.first_step, self.made, self.lost = folder, first_step, made, 0
        self._beginning = b"".join(_record(step=first_step, summary=summary) for summary in beginning)
        self._waiting: deque[tuple[int, bytes]] = deque()  # with their steps
        self._path: Path | None = None  # of which the first `_written` bytes are whole records
        self._written = self._held = 0

    @property
    def is_waiting(self) -> bool:
        """Whether there are records that are not on the disk."""
        return bool(self._waiting) or self._path is None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.add(summaries.scalar(tag, value), step)

    def add_image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """A picture, uint8 [height, width, 3]."""
        self.add(summaries.image(tag, pixels, dataformats="HWC"), step)

    def add(self, summary: Any, step: int) -> None:
        record = _record(step=step, summary=summary)
        self._waiting.append((step, record))
        self._held += len(record)
        while self._held > MOST_WAITING:
            self._held -= len(self._waiting.popleft()[1])
            self.lost += 1

    def flush(self) -> None:
        """Write what waits. Raises OSError: it waits on, and what was written of it in part goes before the next flush."""
        if not self.is_waiting:
            return
        if self._path is None or not self._is_whole(self._path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.made()
            name = (
                f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(NUMBERS):04d}"
            )
            self._write(self.folder / name, self._head())
        assert self._path is not None
        self._write(self._path, b"".join(record for _, record in self._waiting))
        self._waiting.clear()
        self._held = 0

    close = flush

    def _head(self) -> bytes:
        """What a file begins with. What the one before still has is not taken back."""
        again = self._path is not None and self._waiting
        session = _record(
            step=self._waiting[0][0] if again else self.first_step, session_log=SessionLog(status=SessionLog.START)
        )
        return _record(file_version="brain.Event:2") + session + self._beginning

    def _write(self, path: Path, data: bytes) -> None:
        """Append; a file that is not `_path` is a new one."""
        at = self._written if path == self._path else 0
        with open(path, "r+b" if at else "wb", buffering=0) as file:
            file.truncate(at)
            file.seek(at)
            rest = memoryview(data)
            while rest:  # a full disk may take a part
                rest = rest[file.write(rest) :]
        self._path, self._written = path, at + len(data)

    def _is_whole(self, path: Path) -> bool:
        try:
            return path.stat().st_size >= self._written
        except FileNotFoundError:
            return False


def _record(**fields: Any) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()
