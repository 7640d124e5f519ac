"""An observer that writes down what a run does and when, so that a fault can be planted at that moment: one JSON line each.

LSYS_EVENTS names the folder; LSYS_SLOW, seconds that a step, a checkpoint and a validation last at least, so that there is time to kill.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsys.train.observers import StepDone, StepObserver


class Watch(StepObserver):
    """Writes `ready`, `step` with the exact loss, and begin and end of pauses."""

    def __init__(self, run: Any) -> None:
        rank = run.groups.launch.rank
        folder = Path(os.environ["LSYS_EVENTS"])
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / f"{rank}.{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115  (closed with the run)
        self.slow = float(os.environ.get("LSYS_SLOW", "0"))
        self.step = run.step
        self.write("ready")

    def write(self, event: str, **more: Any) -> None:
        line = {"time": time.time(), "pid": os.getpid(), "event": event, "step": self.step, **more}
        print(json.dumps(line), file=self.file)

    def end_step(self, done: StepDone) -> None:
        self.step = done.step
        self.write("step", loss=done.losses.entropy.hex(), norm=float(done.grad_norm).hex())
        time.sleep(self.slow)

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        if what in ("checkpoint", "validation"):
            self.write(what)
            time.sleep(self.slow)
        yield
        if what in ("checkpoint", "validation"):
            time.sleep(self.slow)
            self.write(f"{what} ended")

    def close(self, failed: bool) -> None:
        self.file.close()
