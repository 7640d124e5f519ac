"""One run at a time in a folder, also on filesystems that nodes share and whose locks cannot be trusted.

A lock is a file with a number, made exclusively; the holder is the one with the largest number, and touches its file every few seconds.
Who comes later may make the file with the next number once the holder is known to have ended, or has not touched its file for a while:
only one can. Changes are looked for, never times compared, so clocks need not agree. A holder that slept meanwhile finds a larger number
than its own before it writes a checkpoint.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from lsys.runtime.job import Job, job_from_environment

BEAT_SECONDS = 5.0
QUIET_SECONDS = 30.0  # without a change, after which a holder counts as ended
HELD, RELEASED = ".json", ".released"


class LockError(ValueError):
    """Another run holds the folder, or has taken it over. Only the rank that looked knows, unless it tells."""


class LostError(LockError):
    """Another run has taken the folder over. Raised on every rank."""

    everywhere = True


@dataclass(frozen=True)
class Holder:
    """The process that made a lock.

    Attributes:
        host: name of its machine. process: its id. birth: which boot, process namespace and start of process these count in.
        job: what its launcher calls it. since: when it took the folder, in words.
    """

    host: str
    process: int
    birth: str
    job: Job
    since: str

    @classmethod
    def here(cls) -> "Holder":
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        return cls(socket.gethostname(), os.getpid(), _birth(os.getpid()) or "", job_from_environment(), since)

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """None where the file says nothing of use: its writer was interrupted, or another version wrote it."""
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            job = Job.from_tree(tree["job"])
            return cls(str(tree["host"]), int(tree["process"]), str(tree["birth"]), job, str(tree["since"]))
        except (OSError, LookupError, TypeError, ValueError):
            return None

    def to_text(self) -> str:
        tree: dict[str, Any] = {"host": self.host, "process": self.process, "birth": self.birth, "since": self.since}
        return json.dumps(tree | {"job": self.job.to_tree()}, indent=1) + "\n"

    def has_ended(self) -> bool:
        """Whether it is known to be gone: it was a process of this machine, of the same boot and namespace, and is none now."""
        here = _machine()
        if self.host != socket.gethostname() or not self.birth.startswith(f"{here} "):
            return False
        return _birth(self.process) != self.birth

    def is_alive(self) -> bool:
        """Whether it is known to be there still: a process of this machine."""
        return bool(self.birth) and self.host == socket.gethostname() and _birth(self.process) == self.birth

    def __str__(self) -> str:
        job = f", job {self.job.run or self.job.slurm}" if self.job.run or self.job.slurm else ""
        return f"process {self.process} on {self.host}{job}, since {self.since}"


class _Seen(NamedTuple):
    """The newest lock of a folder: its number, whether it is released, and when its holder touched it last."""

    number: int
    released: bool
    beat: int


class FolderLock:
    """Context manager that holds a folder for this process.

    Args:
        folder: made if it is not there.
        tell: is told why one waits.
        beat, quiet: seconds between touches, and without one until a holder counts as ended.

    Attributes:
        is_lost: whether another process was seen to hold it since.

    Raises:
        LockError: on entering, where another process holds the folder; it names that process.
    """

    def __init__(
        self,
        folder: Path,
        tell: Callable[[str], None] = print,
        *,
        beat: float = BEAT_SECONDS,
        quiet: float = QUIET_SECONDS,
    ) -> None:
        self.run, self.folder = folder, folder / "lock"
        self.tell, self.beat, self.quiet = tell, beat, quiet
        self.number = 0  # none yet
        self.is_lost = False
        self._ended_holder: _Seen | None = None
        self._ended = threading.Event()

    def look(self) -> None:
        """Raise LockError where another process holds the folder, as entering does; nothing is made."""
        self._looked()

    def _looked(self) -> int:
        """The number of the newest lock, whose holder has ended, or has not been heard of; 0 without one. Only one above it may be taken."""
        seen = self._newest()
        if seen is None or seen.released or seen == self._ended_holder:
            return seen.number if seen else 0
        holder = Holder.read(self._path(seen.number))
        follows = holder is not None and holder.job.has_id and job_from_environment().is_restart_of(holder.job)
        if holder is None or not (holder.has_ended() or (follows and not holder.is_alive())):
            self._watch(seen, holder, follows)
        self._ended_holder = seen
        return seen.number

    def __enter__(self) -> "FolderLock":
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self.number:
            self._try()
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._path(self.number).rename(self._path(self.number, RELEASED))
        except OSError:
            pass  # taken over and cleared away, or the folder is gone: nothing of ours is left to release

    def require(self) -> None:
        """Raise LockError where another process holds the folder now: what this one wrote would mix with that run's files.

        Raises:
            OSError: the lock cannot be seen.
        """
        seen = self._newest()
        if (
            seen is None or seen.number < self.number
        ):  # the filesystem may be away for a while, or somebody removed them
            raise FileNotFoundError(errno.ENOENT, "the files of the run's lock are gone", str(self.folder))
        if seen.number > self.number:
            holder = Holder.read(self._path(seen.number)) or "another run"
            text = f"{holder} has taken it over while this process did not answer; nothing more is written into it"
            raise LockError(f"train.folder {self.run} is no longer this run's: {text}")

    def _try(self) -> None:
        """Take the folder, wait until its holder is known to have ended, or raise LockError. What was looked at counts, not what is there then."""
        number = 1 + self._looked()
        try:
            handle = os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return  # another newcomer was faster: it is the holder to look at
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(Holder.here().to_text())
            file.flush()
            os.fsync(handle)
        newest = self._newest()
        if newest is not None and newest.number > number:  # what was seen at first was long out of date
            self._path(number).unlink(missing_ok=True)
            return
        self.number = number
        for old in self._numbers():
            if old < number:
                for ending in (HELD, RELEASED):
                    self._path(old, ending).unlink(missing_ok=True)

    def _watch(self, seen: _Seen, holder: Holder | None, follows: bool) -> None:
        """Return when the holder has ended, or has not touched its file for `quiet` seconds; raise LockError when it does.

        Args:
            follows: whether this is the holder's own job, started anew: the holder is given all that time to end.
        """
        who = str(holder or "a process that left no name")
        self.tell(
            f"train.folder {self.run} was taken by {who}: waiting up to {self.quiet:g} s for a sign that it is alive"
        )
        end, is_over = time.monotonic() + self.quiet, False
        while not is_over:
            time.sleep(min(1.0, self.quiet / 10))
            now, is_over = self._newest(), time.monotonic() >= end
            if (now is not None and now.number == seen.number and now.released) or (holder and holder.has_ended()):
                return
            waits = follows and not is_over and now is not None and now.number == seen.number
            if now != seen and not waits:
                who = str((now and Holder.read(self._path(now.number))) or who)
                raise LockError(
                    f"train.folder {self.run} is in use by {who}; stop that run, or give this one another train.folder"
                )

    def _touch(self) -> None:
        path = self._path(self.number)
        while not self._ended.wait(self.beat):
            try:
                self.require()
                os.utime(path)  # takes no space, so a full disk does not make a run look dead
            except LockError:
                self.is_lost = True
                return
            except OSError:
                continue  # `require` finds out before anything is written

    def _path(self, number: int, ending: str = HELD) -> Path:
        return self.folder / f"{number:08d}{ending}"

    def _numbers(self) -> set[int]:
        names = (name.partition(".")[0] for name in os.listdir(self.folder))
        return {int(name) for name in names if name.isdigit()}

    def _newest(self) -> _Seen | None:
        """Opened, not only looked at: a network filesystem asks its server then."""
        number = max(self._numbers(), default=0) if self.folder.exists() else 0
        for ending in (HELD, RELEASED) if number else ():
            try:
                with open(self._path(number, ending), "rb") as file:
                    return _Seen(number, ending == RELEASED, os.fstat(file.fileno()).st_mtime_ns)
            except FileNotFoundError:
                continue
        return None


def _machine() -> str:
    """This boot of this machine, and the namespace that process ids count in; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _birth(process: int) -> str | None:
    """What tells a process from all others, also from one that gets its id later; None if there is no such process, or no telling."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] == "Z" else f"{_machine()} {stat[19]}"
