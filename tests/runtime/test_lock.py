"""Two runs in one folder: the second is refused, takes over from a dead one, and a sleeper that lost the folder writes nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lsys.runtime.lock import FolderLock, Holder, LockError

HOLD = """
import sys, time
from pathlib import Path
from lsys.runtime.lock import FolderLock
with FolderLock(Path(sys.argv[1]), beat=0.05):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process that holds tmp_path until a line comes."""
    started: list[subprocess.Popen] = []

    def start(**variables: str) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLD, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(words, env={**os.environ, **variables}, text=True, **pipes))  # type: ignore[call-overload]
        assert started[-1].stdout and started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.communicate()


def lock(folder: Path, quiet: float = 5.0) -> FolderLock:
    return FolderLock(folder, lambda text: None, beat=0.05, quiet=quiet)


@pytest.mark.fault("two runs in a folder")
def test_a_second_run_is_refused_by_the_holders_name(tmp_path: Path, hold: Callable[..., subprocess.Popen]) -> None:
    process = hold(TORCHELASTIC_RUN_ID="job-a")
    with pytest.raises(LockError, match=rf"in use by process {process.pid} on \S+, job job-a.*another train.folder"):
        lock(tmp_path).__enter__()
    process.communicate("\n")  # it ends, and releases
    begun = time.monotonic()
    with lock(tmp_path, quiet=60):
        assert time.monotonic() - begun < 5


def test_a_killed_holder_of_this_machine_is_followed_at_once(
    tmp_path: Path, hold: Callable[..., subprocess.Popen]
) -> None:
    process = hold()
    process.kill()
    process.wait()
    begun = time.monotonic()
    with lock(tmp_path, quiet=60) as mine:
        assert time.monotonic() - begun < 5
        mine.require()
    assert [path.name for path in (tmp_path / "lock").iterdir()] == ["00000002.released"]


def test_the_same_job_is_given_time_to_end_and_then_followed(
    tmp_path: Path, hold: Callable[..., subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers are started anew when those before have ended, or are about to; on another machine nobody knows."""
    process = hold(TORCHELASTIC_RUN_ID="job-a")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-a")
    with pytest.raises(LockError, match=f"in use by process {process.pid} on"):  # it does not end
        lock(tmp_path, quiet=0.5).__enter__()
    threading.Timer(0.5, process.kill).start()
    begun = time.monotonic()
    with lock(tmp_path, quiet=60) as mine:
        assert time.monotonic() - begun < 20
        mine.require()
        monkeypatch.setattr(Holder, "is_alive", lambda self: False)
        monkeypatch.setattr(Holder, "has_ended", lambda self: False)  # as on another machine
        with lock(tmp_path, quiet=60) as other:
            other.require()
            time.sleep(0.2)
            assert mine.is_lost


def test_starts_without_an_id_do_not_follow_each_other(
    tmp_path: Path, hold: Callable[..., subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun restarts a run that was refused: its second start is no restart of the run that refused it."""
    hold()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(LockError, match="in use by process"):
        lock(tmp_path).__enter__()


def test_another_machines_silent_holder_is_waited_for(
    tmp_path: Path, hold: Callable[..., subprocess.Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process may go on; only that it does not touch its file tells that it has ended."""
    process = hold()
    process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with lock(tmp_path, quiet=0.5) as mine:
        assert time.monotonic() - begun >= 0.5
        process.send_signal(signal.SIGCONT)
        time.sleep(0.2)  # it touches a file that is not there, and does no harm
        mine.require()


def test_an_empty_lock_is_watched_like_any(tmp_path: Path) -> None:
    """A writer that was killed between making the file and filling it."""
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / "00000004.json").touch()
    told: list[str] = []
    with FolderLock(tmp_path, told.append, beat=0.05, quiet=0.3) as mine:
        assert mine.number == 5
    assert "a process that left no name" in told[0]


def test_of_many_newcomers_one_gets_it(tmp_path: Path, hold: Callable[..., subprocess.Popen]) -> None:
    process = hold()
    process.kill()
    process.wait()
    held, refused, all_in = [], [], threading.Barrier(8, timeout=60)

    def come() -> None:
        all_in.wait()
        try:
            with lock(tmp_path, quiet=2.0) as mine:
                held.append(mine.number)
                all_in.wait()
        except LockError as error:
            refused.append(str(error))
            all_in.wait()

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7


def test_a_sleeper_that_lost_the_folder_finds_out(tmp_path: Path) -> None:
    with lock(tmp_path) as mine:
        mine.require()
        other = tmp_path / "lock" / f"{mine.number + 1:08d}.json"
        other.write_text(Holder.here().to_text())
        with pytest.raises(LockError, match=rf"process {os.getpid()} on .* has taken it over"):
            mine.require()
    assert other.exists()  # what is the other's is not released
    with lock(tmp_path, quiet=0.2) as mine:
        for path in (tmp_path / "lock").iterdir():
            path.unlink()
        with pytest.raises(FileNotFoundError, match="files of the run's lock are gone"):
            mine.require()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"host": "x"}'])
def test_a_lock_that_says_nothing_has_no_holder(tmp_path: Path, damage: str) -> None:
    (path := tmp_path / "00000001.json").write_text(damage)
    assert Holder.read(path) is None


def test_a_sign_of_life_at_the_last_moment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes between the last look and the end: what is found then is compared, too, also for the holder's own job."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-a")
    (tmp_path / "lock").mkdir()
    holder = tmp_path / "lock" / "00000001.json"
    holder.write_text(Holder.here().to_text())
    now = [0.0]

    def clock() -> float:
        now[0] += 0.2
        os.utime(holder, ns=(0, int(1e9 * (1 + now[0]))))  # it is alive
        return now[0]

    monkeypatch.setattr(Holder, "has_ended", lambda self: False)
    monkeypatch.setattr("lsys.runtime.lock.time.monotonic", clock)
    monkeypatch.setattr("lsys.runtime.lock.time.sleep", lambda seconds: None)
    with pytest.raises(LockError, match=f"in use by process {os.getpid()}"):
        lock(tmp_path, quiet=0.5).__enter__()
