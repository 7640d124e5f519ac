"""The file that TensorBoard reads: on a disk that is full for a while, or whose folder vanishes, no point is lost or there twice."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lsys.observe import events
from lsys.observe.events import EventFile


def points(folder: Path, tag: str = "a") -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder), {"scalars": 0})
    found.Reload()
    return [(point.step, point.value) for point in found.Scalars(tag)] if tag in found.Tags()["scalars"] else []


def add(file: EventFile, steps: range) -> None:
    for step in steps:
        file.add_scalar("a", float(step), step)


def expected(steps: range) -> list[tuple[int, float]]:
    return [(step, float(step)) for step in steps]


def test_tensorboard_reads_scalars_and_pictures(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "new", 1)
    assert file.is_waiting and not list(tmp_path.iterdir())  # nothing touches the disk before
    add(file, range(1, 4))
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    file.add_image("b", picture, 3)
    file.flush()
    assert points(tmp_path / "new") == expected(range(1, 4)) and not file.is_waiting
    found = EventAccumulator(str(tmp_path / "new"))
    found.Reload()
    import io

    from PIL import Image

    (image,) = found.Images("b")
    assert (np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == picture).all()


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """`limited(size)`: files grow to that size at most, which fails as a full disk does; -1: no limit."""
    most, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, most[1]) if size >= 0 else most)
    resource.setrlimit(resource.RLIMIT_FSIZE, most)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_no_point_wherever_it_cuts(tmp_path: Path, limited: Callable[[int], None]) -> None:
    """A limit on the file's size stands for the disk, so that a record is written in part."""
    for room in (0, 1, 20, 41, 60, 100):
        folder = tmp_path / str(room)
        file = EventFile(folder, 1)
        add(file, range(1, 3))
        file.flush()
        (path,) = folder.iterdir()
        size = path.stat().st_size
        add(file, range(3, 8))
        limited(size + room)
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                file.flush()
        limited(-1)
        assert path.stat().st_size == size + room and file.is_waiting  # it was cut there
        add(file, range(8, 10))
        file.flush()
        assert points(folder) == expected(range(1, 10)), room
        assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("how", ["folder", "file", "cut"])
def test_a_file_that_vanished_has_a_successor_which_takes_nothing_back(tmp_path: Path, how: str) -> None:
    made: list[bool] = []
    file = EventFile(tmp_path / "run", 1, [], lambda: made.append((tmp_path / "run").is_dir()))
    add(file, range(1, 4))
    file.flush()
    (path,) = (tmp_path / "run").iterdir()
    size = path.stat().st_size
    add(file, range(4, 6))
    file.flush()
    if how == "folder":
        shutil.rmtree(tmp_path / "run")
    elif how == "file":
        path.unlink()
    else:
        os.truncate(path, size)
    add(file, range(6, 8))
    file.flush()
    kept = expected(range(1, 4)) if how == "cut" else []
    assert points(tmp_path / "run") == kept + expected(range(6, 8)) and made == [True, True]


def test_a_file_in_the_place_of_the_folder_is_an_error_until_it_goes(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "run", 1)
    add(file, range(1, 3))
    (tmp_path / "run").write_text("in the way")
    for _ in range(2):
        with pytest.raises(FileExistsError):
            file.flush()
    (tmp_path / "run").unlink()
    file.flush()
    assert points(tmp_path / "run") == expected(range(1, 3))


def test_a_resumed_run_takes_back_what_came_after_its_step(tmp_path: Path) -> None:
    for first, steps in ((1, range(1, 8)), (5, range(5, 7))):
        file = EventFile(tmp_path, first)
        add(file, steps)
        file.flush()
    assert points(tmp_path) == expected(range(1, 7))


def test_what_waits_is_bounded_and_the_oldest_goes_first(tmp_path: Path, monkeypatch: Any) -> None:
    file = EventFile(tmp_path, 1)
    add(file, range(1, 2))
    monkeypatch.setattr(events, "MOST_WAITING", 3 * file._held + 1)
    add(file, range(2, 11))
    assert file.lost == 7
    file.flush()
    assert points(tmp_path) == expected(range(8, 11))
