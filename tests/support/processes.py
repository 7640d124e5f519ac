"""Processes that tests start indirectly, and know by the ids that these write into files."""

import time
from pathlib import Path


def number(path: Path, seconds: float = 60) -> int:
    """The number in a file, waited for."""
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < end, f"{path} is not written"
        time.sleep(0.1)
    return int(path.read_text())


def is_alive(process: int) -> bool:
    """Whether it runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
