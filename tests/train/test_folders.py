"""Folders that cannot be written, and a disk without room for a checkpoint, are refused in one sentence before process groups start."""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import parity

from lsys.checkpoint.manifest import Cursor, FileRecord, Manifest
from lsys.config.load import dump
from lsys.config.messages import FilesError
from lsys.config.schema import Config
from lsys.predict.checkpoint import checkpoint_bytes
from lsys.runtime.environment import Launch
from lsys.train import folders
from lsys.train import run as train
from lsys.train.finished import finished_step
from lsys.train.folders import require_folders, unwritable, without_room

ONE = Launch()


def settings(folder: Path, **changes: Any) -> Config:
    config = parity.settings(train__folder=folder, **changes)
    assert config.checkpoint.save and config.metrics.tensorboard
    return config


def changed(config: Config, section: str, **changes: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def test_folders_are_made_and_nothing_stays_in_them(tmp_path: Path) -> None:
    config = settings(tmp_path / "a" / "run", train__profile={"first": 1})
    require_folders(config, ONE)
    made = sorted(path.relative_to(tmp_path / "a" / "run").as_posix() for path in (tmp_path / "a").rglob("*"))
    assert made == [".", "checkpoints", "profile", "tensorboard"]
    bare = changed(changed(settings(tmp_path / "b"), "checkpoint", save=False), "metrics", tensorboard=False)
    require_folders(bare, ONE)
    assert not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize("place", ["", "run", "run/checkpoints", "run/tensorboard", "run/profile"])
def test_a_file_in_the_way_is_named_and_its_removal_helps(tmp_path: Path, place: str) -> None:
    config, file = settings(tmp_path / "way" / "run", train__profile={"first": 1}), tmp_path / "way" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    with pytest.raises(FilesError) as refused:
        require_folders(config, ONE)
    (mistake,) = refused.value.mistakes
    assert mistake.key == "train.folder" and f"{file} is no folder" in mistake.problem
    assert (
        "cannot be written, and " in mistake.problem and "take another train.folder, or move that file" in mistake.fix
    )
    require_folders(config, Launch(rank=1, world_size=2, local_rank=1, local_world_size=2))  # one for each node asks
    require_folders(settings(tmp_path / "other"), ONE)
    file.unlink()
    require_folders(config, ONE)


@pytest.mark.parametrize("at", ["mkdir", "open", "fsync"])
@pytest.mark.parametrize(
    "code, remedy", [(errno.EROFS, "reading only"), (errno.ENOSPC, "free space there"), (errno.EACCES, "let this user")]
)
def test_a_disk_that_refuses_is_said_once_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, code: int, remedy: str
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    if at == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuses)
    elif at == "open":
        monkeypatch.setattr(folders, "open", refuses, raising=False)
    else:
        monkeypatch.setattr(os, "fsync", refuses)
    (mistake,) = unwritable(settings(tmp_path / "run"))
    assert os.strerror(code) in mistake.problem and str(tmp_path / "run") in mistake.problem and remedy in mistake.fix
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of that size; skips where there can be none."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_room_on_a_small_disk(tmp_path: Path) -> None:
    with disk(tmp_path, "1m"):
        config = settings(tmp_path / "run", model__hidden=512)
        needed = checkpoint_bytes(config)
        assert needed > 1 << 20
        with pytest.raises(
            FilesError, match=rf"a checkpoint takes {needed:,} bytes, and .*checkpoints has room for 1,0..,..."
        ):
            require_folders(config, ONE)
        require_folders(changed(config, "checkpoint", save=False), ONE)
        require_folders(settings(tmp_path / "run"), ONE)  # a small model has room


@pytest.mark.parametrize(
    "missing, blocks, leftover, is_refused",
    [(0, 9, 0, False), (1, 9, 0, True), (1, 9, 1, False), (2, 9, 1, True), (1, 0, 0, False)],
)
def test_room_is_counted_to_the_byte_with_what_a_save_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int, blocks: int, leftover: int, is_refused: bool
) -> None:
    config = settings(tmp_path)
    partial = tmp_path / "checkpoints" / "step-00000007.partial"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"x" * leftover)
    free = checkpoint_bytes(config) - missing
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=blocks))
    found = list(without_room(config))
    assert bool(found) == is_refused
    if found:
        assert f"has room for {free + leftover:,}" in found[0].problem and "checkpoint.save: false" in found[0].fix


def test_a_run_asks_before_its_process_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train, "check_files", lambda _: None)
    monkeypatch.setattr(train, "open_corpora", lambda *_, **__: [])
    monkeypatch.setattr(train.position, "refuse_other_data", lambda *_: None)
    monkeypatch.setattr(train, "process_groups", lambda *_, **__: pytest.fail("process groups were started"))
    with pytest.raises(FilesError, match="file is no folder"), train.open_run(settings(tmp_path / "file" / "run")):
        pass


# ---- a run without a step left


def checkpoint(config: Config, step: int, serial: int, size: int = 1) -> None:
    folder = config.train.folder / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"x" * size)
    Manifest(Cursor(step, step, dump(config)), serial, 1, {}, {}, {"a": FileRecord(1, "")}).write(folder)


def test_nothing_to_do_is_known_without_an_engine(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(train, "open_run", lambda _: pytest.fail("a run was opened"))
    config = settings(tmp_path, train__steps=4)
    checkpoint(config, 4, 2)
    assert train.main(config) == 0
    assert (
        capsys.readouterr().out
        == "nothing to do: train.steps is 4 and the checkpoint has done 4; raise train.steps to go on\n"
    )


@pytest.mark.parametrize(
    "case",
    [
        "more steps",
        "went back",
        "another model",
        "cut",
        "no checkpoint",
        "two nodes",
        "a path",
        "a leftover",
        "damaged",
    ],
)
def test_what_has_more_to_do_or_is_unclear_starts(tmp_path: Path, case: str) -> None:
    config = settings(tmp_path, train__steps=4)
    if case != "no checkpoint":
        checkpoint(config, 4, 2, size=2 if case == "cut" else 1)
    assert finished_step(config, ONE) == (None if case in ("cut", "no checkpoint") else 4)
    if case == "went back":
        checkpoint(config, 2, 3)
    if case == "a leftover":
        (tmp_path / "checkpoints" / "step-00000004.partial").mkdir()
    if case == "damaged":  # a start found that its bytes are not what was written
        checkpoint(config, 3, 1)
        (tmp_path / "checkpoints" / "step-00000004").rename(tmp_path / "checkpoints" / "step-00000004.damaged")
    changes: dict[str, Any] = {"more steps": {"train__steps": 5}, "another model": {"model__hidden": 128}}.get(case, {})
    now = settings(tmp_path, **{"train__steps": 4, **changes})
    if case == "a path":
        now = changed(now, "checkpoint", resume=tmp_path / "checkpoints" / "step-00000004")
    assert finished_step(now, Launch(world_size=2) if case == "two nodes" else ONE) is None
