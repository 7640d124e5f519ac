"""What a run asks of the disk before its process groups start: that it can write where it will, and room for a checkpoint.

One process of each node asks: a folder may be there on one node and not on another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lsys.checkpoint.starts import FOLDER
from lsys.config import Config
from lsys.config.messages import FilesError, Mistake
from lsys.observe.run_dir import tensorboard_folder
from lsys.predict.checkpoint import checkpoint_bytes
from lsys.runtime.environment import Launch

REMEDIES = {
    errno.ENOSPC: "free space there, or take another train.folder",
    errno.EDQUOT: "free space of your quota, or take another train.folder",
    errno.EROFS: "the file system is mounted for reading only: take another train.folder",
}
MOVE = "take another train.folder, or move that file"
OTHER = "let this user write there, or take another train.folder"
PIECE = b"\0" * 4096  # that is written to see whether it can be


def require_folders(config: Config, launch: Launch) -> None:
    """Refuse a run that could not write what it is to write. Makes the folders.

    Raises:
        FilesError: it names every folder with its reason, or the bytes that a checkpoint needs and those there are.
    """
    if launch.local_rank == 0 and (mistakes := [*unwritable(config)] or [*without_room(config)]):
        raise FilesError(mistakes)


def folders(config: Config) -> dict[str, Path]:
    """What a run writes into, by what it writes there."""
    folder = config.train.folder
    found = {"its record": folder}
    if config.checkpoint.save:
        found["checkpoints"] = folder / FOLDER
    if config.metrics.tensorboard:
        found["curves (metrics.tensorboard)"] = tensorboard_folder(config)
    if config.train.profile.first:
        found["traces (train.profile)"] = folder / "profile"
    return found


def unwritable(config: Config) -> Iterator[Mistake]:
    """The folders in which no file can be made, written to the disk and removed; of those that fail alike, the first."""
    seen: set[Path | int | None] = set()
    for what, folder in folders(config).items():
        try:
            _probe(folder)
        except OSError as error:
            blocked = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
            if (blocked or error.errno) not in seen:
                reason = f"{blocked} is no folder" if blocked else error.strerror or type(error).__name__
                problem = f"{folder} cannot be written, and {what} would go there: {reason}"
                yield Mistake(
                    "train.folder", problem, MOVE if blocked else REMEDIES.get(error.errno or 0, OTHER), is_local=True
                )
            seen.add(blocked or error.errno)


def _probe(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".lsys-{socket.gethostname()}-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.write(PIECE)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    path.unlink()


def without_room(config: Config) -> Iterator[Mistake]:
    """A folder of checkpoints that has no room for one more."""
    if not config.checkpoint.save:
        return
    folder, needed = config.train.folder / FOLDER, checkpoint_bytes(config)
    with contextlib.suppress(OSError):  # it does not tell: the first save will
        if (free := _free(folder, needed)) < needed:
            problem = f"a checkpoint takes {needed:,} bytes, and {folder} has room for {free:,}"
            remedy = "free space, take another train.folder, or set checkpoint.save: false"
            yield Mistake("train.folder", problem, remedy, is_local=True)


def _free(folder: Path, enough: int) -> int:
    """Bytes that a save finds. It removes first what an interrupted one has left there."""
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    if not there.f_blocks or free >= enough:  # some network file systems say nothing but zeros
        return max(free, enough)
    return free + sum(path.stat().st_size for path in folder.glob("step-*.partial/*"))
