"""All ranks begin with one checkpoint, whole to its last byte, or none begins; what is damaged gets another name and the previous one is used."""

import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from support import folders, stale

DRAWS = 28


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fresh(rank: int, run: Path, steps: tuple[int, ...] = (4, 8, 12)) -> None:
    """A run's folder with whole checkpoints, made anew by the first rank."""
    if rank == 0:
        shutil.rmtree(run, ignore_errors=True)
        for serial, step in enumerate(steps, 1):
            folders.write(run / "checkpoints", step, serial)
    dist.barrier()


def chosen(settings: Any) -> str:
    """The name of the checkpoint, or why there is none."""
    from lsys.checkpoint import CheckpointError
    from lsys.checkpoint.agreed import choose

    try:
        found = choose(settings)
    except CheckpointError as error:
        return str(error)
    return found.plan.checkpoint.name if found.plan.checkpoint else "none"


def damages(rank: int, world_size: int, run: Path, seed: int) -> list[tuple[str, str, str, list[str]]]:
    """(kind, file, what was chosen, what is in the folder) for damages of the newest checkpoint drawn by a seed."""
    rng, seen = random.Random(seed), []
    for _ in range(DRAWS):
        fresh(rank, run)
        own = run / "checkpoints"
        kind, name = rng.choice(folders.KINDS), rng.choice([*folders.FILES, "manifest.json"])
        place = random.Random(rng.random())
        if rank == 0:
            folders.damage(own / "step-00000012", name, kind, place, own / "step-00000008")
        dist.barrier()
        seen.append((kind, name, chosen(folders.settings(run)), names(own)))
        dist.barrier()
    return seen


@pytest.mark.fault("damaged checkpoint")
def test_every_damage_is_named_and_the_previous_one_is_used(gloo: Any, tmp_path: Path) -> None:
    first, second = gloo(2, damages, tmp_path / "run", 11)
    assert [each[:3] for each in first] == [each[:3] for each in second]
    assert {each[0] for each in first} == set(folders.KINDS)
    for kind, name, found, there in first:
        assert found == "step-00000008", (kind, name)
        assert there == ["step-00000004", "step-00000008", "step-00000012.damaged"], (kind, name)


def several(rank: int, world_size: int, run: Path) -> list[Any]:
    """Two damaged ones; then all; then the same command again; then from scratch."""
    own, seen = run / "checkpoints", list[Any]()
    fresh(rank, run)
    for steps in ((12, 8), (4,), ()):
        for step in steps if rank == 0 else ():
            folders.damage(own / f"step-{step:08d}", folders.FILES[step % 3], "flip", random.Random(step), own)
        dist.barrier()
        seen += [chosen(folders.settings(run)), names(own)]
        dist.barrier()
    return [*seen, chosen(folders.settings(run, resume="scratch"))]


def test_where_all_are_damaged_the_run_stops_for_good(gloo: Any, tmp_path: Path) -> None:
    first, second = gloo(2, several, tmp_path / "run")
    assert first == second
    used, there, text, damaged, again, left, scratch = first
    assert used == "step-00000004" and there == ["step-00000004", "step-00000008.damaged", "step-00000012.damaged"]
    assert damaged == left == [f"step-{step:08d}.damaged" for step in (4, 8, 12)]
    for each in (text, again):
        assert "has no whole checkpoint" in each and "checkpoint.resume scratch sets them aside" in each
    assert scratch == "none"


def named(rank: int, world_size: int, other: Path, new: Path) -> list[Any]:
    """From damaged checkpoints of another run, which is not this one's to change."""
    own = other / "checkpoints"
    fresh(rank, other)
    if rank == 0:
        folders.damage(own / "step-00000012", "common.pt", "flip", random.Random(1), own)
    dist.barrier()
    by_run, by_name = (chosen(folders.settings(new, resume=path)) for path in (other, own / "step-00000012"))
    weights = chosen(folders.settings(new, weights=other))
    return [by_run, by_name, weights, names(own)]


def test_another_runs_checkpoints_keep_their_names(gloo: Any, tmp_path: Path) -> None:
    first, second = gloo(2, named, tmp_path / "other", tmp_path / "new")
    by_run, by_name, weights, there = first
    assert first == second and by_run == weights == "step-00000008"
    assert "common.pt was changed after it was written" in by_name and "other whole checkpoints in" in by_name
    assert there == ["step-00000004", "step-00000008", "step-00000012"]


def unlike(rank: int, world_size: int, run: Path, cases: list[tuple[str, int]]) -> list[str]:
    """What is chosen where one rank sees something else."""
    from contextlib import nullcontext

    from lsys.checkpoint import agreed

    seen = []
    with mock.patch.object(agreed, "VISIBLE_SECONDS", 1.0):
        for fault, where in cases:
            fresh(rank, run)
            shown = stale.view(fault, "step-00000012", file="__1_0.distcp", older=run / "checkpoints" / "step-00000008")
            with shown if rank == where else nullcontext():
                seen.append(chosen(folders.settings(run)))
            dist.barrier()
            assert names(run / "checkpoints") == ["step-00000004", "step-00000008", "step-00000012"]
            dist.barrier()  # the next case makes the folder anew
    return seen


@pytest.mark.fault("stale listing")
def test_ranks_that_do_not_see_the_same_do_not_begin(gloo: Any, tmp_path: Path) -> None:
    cases = [("hidden", 1), ("hidden", 0), ("manifest", 1), ("bytes", 1), ("late", 1), ("late", 0), ("older", 1)]
    first, second = gloo(2, unlike, tmp_path / "run", cases)
    assert first == second
    behind, ahead, manifest, content, late, later, older = first
    assert behind.startswith("rank 1: ") and "step-00000012, which rank 0 reads, cannot be read here" in behind
    assert "rank 1 sees" in ahead and "step-00000012, rank 0 does not" in ahead
    for each in (manifest, older):
        assert each.startswith("rank 1: ") and "step-00000012/manifest.json has SHA-256" in each
    assert "others do not: rank 1: __1_0.distcp was changed" in content
    assert late == later == "step-00000012"  # a shared filesystem takes its time
    assert all("one filesystem that all ranks share" in text for text in first[:4])


def test_a_rename_that_fails_is_told(tmp_path: Path) -> None:
    from lsys.checkpoint import CheckpointError
    from lsys.checkpoint.agreed import _rename

    with pytest.raises(
        CheckpointError,
        match="step-00000004 is damaged .it is short. and could not be renamed to step-00000004.damaged",
    ):
        _rename(tmp_path / "step-00000004", "it is short", lambda: None)


def comes_back(rank: int, world_size: int, run: Path) -> str:
    """What is chosen where the newest checkpoint is damaged and its name is taken by the same bytes again, as by a copy that goes on."""
    from lsys.checkpoint import agreed

    fresh(rank, run)
    newest = run / "checkpoints" / "step-00000012"
    if rank == 0:
        folders.damage(newest, folders.FILES[0], "flip", random.Random(1), newest)
    dist.barrier()
    with mock.patch.object(agreed, "_rename", lambda path, damage, guard: f"{path} is renamed"):
        return chosen(folders.settings(run))


def test_a_damaged_checkpoint_that_comes_back_is_not_tried_for_ever(gloo: Any, tmp_path: Path) -> None:
    for said in gloo(2, comes_back, tmp_path / "run", timeout=30):
        assert "was found damaged and is there again under this name: " in said and said.endswith("; move it away")
