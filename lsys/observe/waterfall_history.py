"""The waterfalls of a whole run, also of what it did before it was resumed: read back from its own curves."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsys.observe.waterfall import TAGS, part_of

# Bytes. Events of curves have about 60: what is larger than LARGEST (pictures, texts) is passed over unread. The beginnings of a
# session, which take back points, have about 25.
LARGEST, SESSION = 4096, 40


class WaterfallHistory:
    """The share of each part of a step, of every report: about 60 bytes each.

    Attributes:
        steps: of the reports, ascending. shares: by part, % at each of them; 0 where a report has no such part.
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self.shares: dict[str, array[float]] = {}

    def add(self, step: int, percent: Mapping[str, float]) -> None:
        """Take over the next report, or some parts of it."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
            for column in self.shares.values():
                column.append(0.0)
        for part, share in percent.items():
            column = self.shares.setdefault(part, array("f"))
            column.extend([0.0] * (len(self.steps) - len(column)))
            column[-1] = share

    def forget(self, first_step: int) -> None:
        """Drop the reports from this step on."""
        kept = bisect_left(self.steps, first_step)
        del self.steps[kept:]
        for column in self.shares.values():
            del column[kept:]

    def columns(self, most: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """At most so many means of neighbouring reports: the last step of each, int64 [n], and of each part their shares, float32 [n]."""
        size = -(-len(self.steps) // most)
        if size < 2:
            return np.array(self.steps), {part: np.array(column) for part, column in self.shares.items()}
        starts = np.arange(0, len(self.steps), size)
        ends = np.append(starts[1:], len(self.steps))
        shares = {
            part: np.add.reduceat(np.array(column), starts) / (ends - starts) for part, column in self.shares.items()
        }
        return np.array(self.steps)[ends - 1], shares


def read_history(folder: Path, first_step: int) -> WaterfallHistory:
    """What a run's event files say of the steps before `first_step`, without what its resumptions took back.

    They are read without checksums, 50 times as fast as by TensorBoard's own reader in Python: a run of weeks has millions of events.
    A file ends where an event is cut or damaged, as after a full disk.
    """
    history = WaterfallHistory()
    for path in sorted(folder.glob("*tfevents*")):  # TensorBoard's order
        for event in _events(path):
            if event.HasField("session_log"):
                history.forget(event.step)  # the points from there on were taken back
            for value in event.summary.value:
                part = part_of(value.tag)
                if part is not None:
                    history.add(event.step, {part: value.simple_value})
    history.forget(first_step)
    return history


def _events(path: Path) -> Iterator[Any]:
    """The small events of a file. Each is there as its length (8 bytes), a checksum (4), itself and a checksum (4)."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    mark = TAGS.encode()
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", head)
            if length > LARGEST:
                file.seek(length + 4, 1)
                continue
            record = file.read(length + 4)[:length]
            if len(record) < length:
                return
            if mark not in record and len(record) > SESSION:
                continue
            try:
                yield Event.FromString(record)
            except DecodeError:
                return
