"""What is on the disk: whole checkpoints only, as many as asked, and what was there before when writing fails."""

import errno
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from support import resuming

from lsys.checkpoint import CheckpointError, Checkpoints, Cursor, Manifest
from lsys.checkpoint.manifest import FileRecord, UnreadableError, _digest
from lsys.runtime.lock import LockError, LostError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saves(rank: int, world_size: int, folder: Path, keep: int, steps: list[int]) -> list[str]:
    """Save after the given steps (of an engine that has done one); the newest checkpoint after each."""
    newest = []
    with resuming.engine_of(rank, world_size, {}) as engine:
        resuming.advance(engine, 0, 1, resuming.Seen())
        checkpoints = Checkpoints(folder, keep)
        for step in steps:
            checkpoints.save(engine, resuming.cursor_of(engine, step))
            latest = checkpoints.latest()
            assert latest is not None
            newest.append(latest.name)
    return newest


def loads(rank: int, world_size: int, folder: Path, name: str, changes: dict[str, Any]) -> Cursor:
    with resuming.engine_of(rank, world_size, changes) as engine:
        return Checkpoints(folder, 1).load(engine, folder / name)


def refusals(rank: int, world_size: int, folder: Path, names: list[str], changes: dict[str, Any]) -> list[str]:
    """The messages with which loading each of the checkpoints fails."""
    texts = []
    with resuming.engine_of(rank, world_size, changes) as engine:
        for name in names:
            try:
                Checkpoints(folder, 1).load(engine, folder / name)
                texts.append("loaded")
            except CheckpointError as error:
                texts.append(str(error))
    return texts


def test_last_ones_are_kept_and_the_newest_is_the_one_written_last(gloo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert Checkpoints(folder, 2).latest() is None
    (newest,) = gloo(1, saves, folder, 2, [10, 20, 30])
    assert newest == ["step-00000010", "step-00000020", "step-00000030"]
    assert names(folder) == ["step-00000020", "step-00000030"]
    (newest,) = gloo(1, saves, folder, 2, [25])  # a run that went back to 20
    assert newest == ["step-00000025"] and names(folder) == ["step-00000025", "step-00000030"]
    (newest,) = gloo(1, saves, folder, 2, [30])
    assert newest == ["step-00000030"] and names(folder) == ["step-00000025", "step-00000030"]


def test_leftovers_are_passed_over_then_removed(gloo: Any, tmp_path: Path, caplog: Any) -> None:
    gloo(2, saves, tmp_path, 3, [10, 20])
    for name in ("step-00000030.partial", "step-00000040", "notes"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "step-00000020" / "manifest.json", tmp_path / "step-00000030.partial")
    next((tmp_path / "step-00000020").glob("__1_*.distcp")).unlink()
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(tmp_path, 3).latest() == tmp_path / "step-00000010"
    assert "__1_0.distcp is missing" in caplog.text and "step-00000030.partial" in caplog.text
    gloo(2, saves, tmp_path, 3, [15])
    damaged = ["step-00000020", "step-00000040"]  # stay until a run begins, which renames them
    assert names(tmp_path) == sorted(["notes", "step-00000010", "step-00000015", *damaged])


def test_replaced_checkpoint_counts_until_the_new_one_is_there(gloo: Any, tmp_path: Path) -> None:
    gloo(1, saves, tmp_path, 1, [10])
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000010.replaced")
    assert Checkpoints(tmp_path, 1).latest() == tmp_path / "step-00000010.replaced"
    gloo(1, saves, tmp_path, 1, [10])
    assert names(tmp_path) == ["step-00000010"]


def test_cursor_and_manifest(gloo: Any, tmp_path: Path) -> None:
    gloo(2, saves, tmp_path, 1, [7])
    first, second = gloo(2, loads, tmp_path, "step-00000007", {})
    assert first == second and (first.step, first.tokens, first.extra) == (7, 7 * 4 * 97, {"note": "kept"})
    manifest = Manifest.read(tmp_path / "step-00000007")
    assert manifest.world == 2 and manifest.degrees["data"] == 2
    assert set(manifest.files) | {"manifest.json"} == set(names(tmp_path / "step-00000007"))
    assert all(manifest.files.values()) and Manifest.from_text(manifest.to_text()) == manifest


def fails(rank: int, world_size: int, folder: Path, target: str, fixed: bool) -> tuple[str, list[str]]:
    """Save at step 20 where one file leads to /dev/full, whose every write is refused: no space left on device."""
    prepare = Checkpoints._prepare

    def plant(self: Checkpoints, partial: Path) -> int:
        serial = prepare(self, partial)
        (partial / target).symlink_to("/dev/full")
        return serial

    with resuming.engine_of(rank, world_size, {}) as engine, pytest.MonkeyPatch.context() as patch:
        resuming.advance(engine, 0, 1, resuming.Seen())
        patch.setattr(Checkpoints, "_prepare", plant)
        try:
            Checkpoints(folder, 1).save(engine, resuming.cursor_of(engine, 20))
            text = "saved"
        except CheckpointError as error:
            text = str(error)
        patch.undo()
        left = names(folder)
        dist.barrier()  # before a rank writes again
        if fixed:
            Checkpoints(folder, 1).save(engine, resuming.cursor_of(engine, 20))
        return text, left


@pytest.mark.fault("full disk in a save")
@pytest.mark.parametrize(
    "target",
    [
        "__0_0.distcp",
        "__1_0.distcp",
        "common.pt",
        "manifest.json",
        pytest.param(".metadata.tmp", marks=pytest.mark.slow),
    ],
)
def test_full_disk_leaves_what_was_there(gloo: Any, tmp_path: Path, target: str) -> None:
    gloo(2, saves, tmp_path, 1, [10])
    for text, left in gloo(2, fails, tmp_path, target, True):
        assert text.startswith(f"checkpoint step 20 not written: no space left on {tmp_path} (errno 28); ")
        assert "the newest whole checkpoint is step-00000010; free space" in text
        assert left == ["step-00000010"]
    assert names(tmp_path) == ["step-00000020"]  # the same run can save once there is space


def small_disk(rank: int, world_size: int, folder: Path) -> list[str]:
    """Save until the disk is full."""
    with resuming.engine_of(rank, world_size, {}) as engine:
        resuming.advance(engine, 0, 1, resuming.Seen())
        for step in range(10, 100, 10):
            try:
                Checkpoints(folder, 99).save(engine, resuming.cursor_of(engine, step))
            except CheckpointError as error:
                return [str(error), *names(folder)]
    return []


def test_small_disk(gloo: Any, tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        for text, *left in gloo(2, small_disk, tmp_path):
            assert "no space left" in text and f"the newest whole checkpoint is {left[-1]};" in text
            assert left and not any(name.endswith(".partial") for name in left)
        assert Checkpoints(tmp_path, 1).latest() == tmp_path / left[-1]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_error_names_the_rank(gloo: Any, tmp_path: Path) -> None:
    gloo(2, saves, tmp_path, 1, [10])
    for text, left in gloo(2, fails, tmp_path, "__1_0.distcp/nowhere", False):
        assert text.startswith("checkpoint step 20 not written to") and "rank 0" in text and "newest" in text
        assert left == ["step-00000010"]


def test_folder_that_ranks_do_not_share(tmp_path: Path) -> None:
    """What other ranks wrote must be visible to the rank that commits."""
    partial = tmp_path / "step-00000010.partial"
    partial.mkdir()
    manifest = Manifest(Cursor(10, 1, ""), 1, 2, {}, {}, {"__1_0.distcp": FileRecord(1, "00")})
    with pytest.raises(CheckpointError, match="__1_0.distcp is missing.; train.folder must be on a shared filesystem"):
        Checkpoints(tmp_path, 1)._commit(partial, tmp_path / "step-00000010", manifest)


def damage(source: Path, kind: str) -> Path:
    """A copy of a checkpoint, damaged."""
    copy = source.with_name(f"copy-{kind.replace(' ', '-')}")
    shutil.copytree(source, copy)
    what, _, name = kind.partition(" ")
    if what == "missing":
        (copy / name).unlink()
    elif what == "truncated":
        os.truncate(copy / name, (copy / name).stat().st_size - 1)
    elif what == "flipped":
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    elif what == "format":
        tree = json.loads((copy / "manifest.json").read_text())
        tree |= {"format": 99}
        del tree["sha256"]
        (copy / "manifest.json").write_text(json.dumps(tree | {"sha256": _digest(tree)}))
    return copy


def test_damage_is_named(gloo: Any, tmp_path: Path) -> None:
    gloo(2, saves, tmp_path, 2, [5, 10])
    source = tmp_path / "step-00000010"
    kinds = [f"flipped {name}" for name in names(source)]
    kinds += ["missing __1_0.distcp", "truncated common.pt", "missing manifest.json", "format", "nothing"]
    copies = [damage(source, kind) for kind in kinds if kind != "nothing"]
    texts = gloo(2, refusals, tmp_path, [copy.name for copy in copies] + ["step-00000010", "step-00000077"], {})
    assert texts[0] == texts[1]
    for kind, text in zip(kinds, texts[0], strict=False):
        what, _, name = kind.partition(" ")
        expected = {
            "flipped": f"{name} was changed after it was written",
            "missing": f"{name} is missing",
            "truncated": f"{name} has ",
            "format": "its format is 99, this lsys reads 1",
            "nothing": "loaded",
        }[what]
        if name == "manifest.json":
            expected = "manifest.json is damaged" if what == "flipped" else "is no checkpoint: it has no manifest.json"
        assert expected in text, kind
    assert "step-00000077 is no checkpoint" in texts[0][-1]
    assert "other whole checkpoints in" in texts[0][-1] and "step-00000005, step-00000010" in texts[0][-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {"../elsewhere": {"size": 1, "sha256": "00"}}}, "it names files outside the checkpoint"),
        ({"format": "one"}, "it has no format number"),
        ({"world": 3}, "its content does not match its own SHA-256"),
    ],
)
def test_a_manifest_that_says_what_it_may_not(change: dict[str, Any], said: str) -> None:
    tree = json.loads(Manifest(Cursor(10, 1, ""), 1, 2, {}, {}, {"__1_0.distcp": FileRecord(1, "00")}).to_text())
    tree |= change
    if "world" not in change:
        tree["sha256"] = _digest({key: value for key, value in tree.items() if key != "sha256"})
    with pytest.raises(ValueError, match=said):
        Manifest.from_text(json.dumps(tree))


def test_other_models_are_refused_field_by_field(gloo: Any, tmp_path: Path) -> None:
    gloo(1, saves, tmp_path, 1, [10])
    changes = {
        "model__layers": 2,
        "model__vocab": 100,
        "model__linear": {"decay": False},
        "optimizer__distributed": False,
    }
    ((text,),) = gloo(1, refusals, tmp_path, ["step-00000010"], changes)
    for part in (
        "model.layers 4 in the checkpoint, 2 in the config",
        "model.mixers.lightning.decay true in the checkpoint, false in the config",
        "model.vocab 61 (padded to 64) in the checkpoint, 100 (padded to 104) in the config",
        "optimizer.distributed true in the checkpoint, false in the config",
    ):
        assert part in text
    allowed = {"model__vocab": 63, "model__rope_base": 500_000.0, "train__precision": "bf16"}
    assert gloo(1, refusals, tmp_path, ["step-00000010"], allowed) == [["loaded"]]


def test_a_checkpoint_older_than_a_key_had_its_default() -> None:
    from support import parity

    from lsys.checkpoint.compatible import differences
    from lsys.config.load import resolved

    tree = resolved(parity.settings())
    for key in ("key_heads", "key_dim"):
        del tree["model"]["linear"][key]
    del tree["model"]["mixers"]["lightning"]["norm"]
    assert differences(yaml.safe_dump(tree), parity.settings()) == []
    (text,) = differences(yaml.safe_dump(tree), parity.settings(model__linear={"norm": "srms"}))
    assert text == "model.mixers.lightning.norm head in the checkpoint, srms in the config"


def loses_its_folder(rank: int, world_size: int, folder: Path, when: str) -> list[str]:
    """Save once, then again while the first rank finds its folder taken: before the save or before its commit."""
    taken: list[str] = []

    def guard() -> None:
        if taken.pop() == "other's" if taken else False:
            raise LockError("the folder is another's")

    with resuming.engine_of(rank, world_size, {}) as engine:
        resuming.advance(engine, 0, 1, resuming.Seen())
        checkpoints = Checkpoints(folder, 2, guard)
        checkpoints.save(engine, resuming.cursor_of(engine, 10))
        if rank == 0:
            taken += {"before": ["other's"], "at the commit": ["other's", "other's", "mine"]}[when]
        with pytest.raises(LostError, match="the folder is another's"):
            checkpoints.save(engine, resuming.cursor_of(engine, 20))
    return names(folder)


@pytest.mark.parametrize("when", ["before", "at the commit"])
def test_a_run_that_lost_its_folder_commits_and_removes_nothing(gloo: Any, tmp_path: Path, when: str) -> None:
    left = gloo(2, loses_its_folder, tmp_path, when)[0]
    assert left == (["step-00000010"] if when == "before" else ["step-00000010", "step-00000020.partial"])


def test_a_manifest_is_on_the_disk_before_its_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure would leave out is asked for by fsync, after the last byte."""
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((handle, os.fstat(handle).st_size)))
    manifest = Manifest(Cursor(10, 1, ""), 1, 2, {}, {}, {"__1_0.distcp": FileRecord(1, "00")})
    manifest.write(tmp_path)
    (file,) = tmp_path.iterdir()
    assert [size for _, size in synced] == [file.stat().st_size]


@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, CheckpointError), (errno.EACCES, UnreadableError)])
def test_a_bad_sector_is_damage_and_a_file_that_may_not_be_read_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    """The first makes the checkpoint a damaged one, whose predecessor is used; the second ends the run: nothing is known of the bytes."""

    def hashed(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("lsys.checkpoint.manifest._hashed", hashed)
    manifest = Manifest(Cursor(10, 1, ""), 1, 2, {}, {}, {"__1_0.distcp": FileRecord(1, "00")})
    with pytest.raises(kind, match=os.strerror(code)) as caught:
        manifest.verify(tmp_path, manifest.files)
    assert type(caught.value) is kind
