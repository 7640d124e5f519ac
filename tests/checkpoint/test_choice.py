"""What a run begins with follows from its configuration and its folder; what cannot begin is told before anything starts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import folders

from lsys.checkpoint import CheckpointError
from lsys.checkpoint.choice import Plan, find_checkpoint, look, mistakes, plan, record
from lsys.checkpoint.manifest import digest

AUTO = {"resume": "auto", "weights": "", "from": "", "manifest": ""}  # as checkpoints of before have it


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of steps 4 and 8."""
    for serial, step in enumerate((4, 8), 1):
        folders.write(tmp_path / "run" / "checkpoints", step, serial, start=AUTO)
    return tmp_path / "run"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another run's folder."""
    for serial, step in enumerate((2, 6), 1):
        folders.write(tmp_path / "other" / "checkpoints", step, serial, start=AUTO)
    return tmp_path / "other"


def said(settings: Any) -> str:
    """Why the run cannot begin."""
    with pytest.raises(CheckpointError) as caught:
        plan(settings)
    return str(caught.value)


def go_on(settings: Any, step: int, serial: int) -> Path:
    """The checkpoint that a run begun now writes after some steps; what is to be set aside is."""
    begun, own = plan(settings), settings.train.folder / "checkpoints"
    started = record(settings, begun, digest(begun.checkpoint) if begun.checkpoint else "")
    if begun.aside:
        shutil.rmtree(own)
    return folders.write(own, step, serial, start=started)


def step(begun: Plan) -> int:
    return int(begun.checkpoint.name[5:]) if begun.checkpoint else 0


def test_auto_takes_the_one_written_last(run: Path, tmp_path: Path) -> None:
    assert plan(folders.settings(run)) == Plan(run / "checkpoints" / "step-00000008", is_own=True)
    folders.write(run / "checkpoints", 6, 3)  # a run that went back to 4
    assert step(plan(folders.settings(run))) == 6
    assert plan(folders.settings(tmp_path / "new")) == Plan()


def test_what_is_not_whole_is_passed_over(run: Path) -> None:
    own = run / "checkpoints"
    (own / "step-00000008" / folders.FILES[1]).write_bytes(b"short")
    (own / "step-00000012.partial").mkdir()
    (own / "step-00000003.deleted").mkdir()
    shutil.copytree(own / "step-00000004", own / "step-00000020")  # says that it is step 4
    found = look(own)
    assert [path.name for path in found.whole] == ["step-00000004"] and step(plan(folders.settings(run))) == 4
    reasons = {path.name: reason for path, reason in found.passed_over.items()}
    assert "__1_0.distcp has 5 bytes, 400 were written" in reasons["step-00000008"]
    assert "manifest.json is that of step 4" in reasons["step-00000020"]
    assert {path.name for path in found.leftovers} == {"step-00000003.deleted", "step-00000012.partial"}


def test_a_folder_that_nobody_may_read_is_not_an_empty_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("lsys.checkpoint.choice.os.listdir", refuse)
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: Permission denied; let this user read it"):
        look(run / "checkpoints")


@pytest.mark.parametrize("how", ["sizes", "manifests", "names"])
def test_where_none_is_whole_no_run_starts_anew(run: Path, tmp_path: Path, how: str) -> None:
    for path in sorted((run / "checkpoints").iterdir()):
        if how == "sizes":
            (path / "common.pt").unlink()
        elif how == "manifests":
            (path / "manifest.json").unlink()
        else:
            path.rename(f"{path}.damaged")
    text = said(folders.settings(run))
    assert "step-00000004" in text and "step-00000008" in text and "checkpoint.resume scratch sets them aside" in text
    assert [str(mistake) for mistake in mistakes(folders.settings(run))] == [f"checkpoint.resume: {text}"]
    assert "has no whole checkpoint" in said(folders.settings(run, weights=tmp_path / "elsewhere"))
    assert plan(folders.settings(run, resume="scratch")) == Plan(aside=True)  # its remedy


def test_a_save_that_was_interrupted_was_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    assert plan(folders.settings(tmp_path)) == Plan()


def test_scratch_is_done_once(run: Path) -> None:
    settings = folders.settings(run, resume="scratch")
    assert plan(settings) == Plan(aside=True)
    made = go_on(settings, 5, 1)
    assert plan(settings) == Plan(made, is_own=True)
    shutil.rmtree(go_on(settings, 6, 2))
    (made / "common.pt").unlink()
    assert "move that folder away" in said(
        settings
    )  # its own checkpoints are damaged: it does not start anew by itself


def test_what_was_done_stays_done_whatever_came_after(run: Path, other: Path, tmp_path: Path) -> None:
    """Also where the run went on with `auto`, went back to a checkpoint of its own, or has checkpoints of before."""
    auto, new = folders.settings(run), tmp_path / "new"
    scratch = folders.settings(run, resume="scratch")
    go_on(scratch, 5, 1)
    back = folders.settings(run, resume=run / "checkpoints" / "step-00000005")
    for serial, settings in enumerate((auto, scratch, auto, back, auto, scratch), 2):
        go_on(settings, 5 + serial, serial)
    for settings in (auto, scratch, back, folders.settings(run, resume=run)):
        assert plan(settings) == Plan(run / "checkpoints" / "step-00000012", is_own=True)
    for settings in (folders.settings(new, resume=other), folders.settings(new, weights=other)):
        assert step(plan(settings)) == 6
        go_on(settings, 1, 1)
        go_on(folders.settings(new), 2, 2)
        assert plan(settings) == Plan(new / "checkpoints" / "step-00000002", is_own=True)
        shutil.rmtree(new)
    folders.write(new / "checkpoints", 3, 1, start=AUTO | {"resume": "scratch"})  # of before
    go_on(folders.settings(new), 4, 2)
    assert step(plan(folders.settings(new, resume="scratch"))) == 4
    assert plan(folders.settings(new, resume="scratch", weights=other)).aside  # another start


@pytest.mark.parametrize("linked", [False, True])
def test_a_start_is_the_same_where_folders_are_seen_under_other_paths(other: Path, run: Path, linked: bool) -> None:
    """Moved, or mounted elsewhere; also where checkpoints of before hold the whole path."""

    def moved(folder: Path) -> Path:
        if linked:
            folder.rename(folder.with_name(f"{folder.name}-real"))
            folder.symlink_to(f"{folder.name}-real")
            return folder
        return folder.rename(folder.with_name(f"{folder.name}-moved"))

    absolute = str(run / "checkpoints" / "step-00000004")
    go_on(folders.settings(run, resume=Path(absolute)), 6, 3)
    go_on(folders.settings(run), 20, 4)
    seen = moved(run)
    again = folders.settings(seen, resume=seen / "checkpoints" / "step-00000004")
    assert step(plan(again)) == 20
    shutil.rmtree(seen / "checkpoints" / "step-00000004")  # by checkpoint.keep
    assert step(plan(again)) == 20
    folders.write(seen / "checkpoints", 21, 5, start=AUTO | {"resume": absolute, "from": absolute, "manifest": "0"})
    if linked:
        assert step(plan(again)) == 21
    kept, new = digest(other / "checkpoints" / "step-00000006"), other.with_name("new")
    asked = {"resume": {"resume": other}, "weights": {"weights": other}}
    for number, (key, settings) in enumerate(asked.items()):
        at = new.with_name(f"new-{key}")
        go_on(folders.settings(at, **settings), 1, 1)
        go_on(folders.settings(at), 2, 2)
        began = AUTO | {key: str(other), "from": str(other / "checkpoints" / "step-00000006"), "manifest": kept}
        folders.write(new.with_name(f"old-{key}") / "checkpoints", 2, 2, start=began)
        began |= {"from": str(other / "checkpoints" / "step-00000002")}  # another one was loaded last
        folders.write(new.with_name(f"late-{key}") / "checkpoints", number, 2, start=began | {key: "/elsewhere"})
    place = moved(other)
    for key in asked:
        other_key = "weights" if key == "resume" else "resume"
        for name in (f"new-{key}", f"old-{key}"):
            assert step(plan(folders.settings(new.with_name(name), **{key: place}))) == 2
            assert "starts a run" in said(folders.settings(new.with_name(name), **{other_key: place}))
        assert "starts a run" in said(folders.settings(new.with_name(f"late-{key}"), **{key: place}))
        folders.write(
            place / "checkpoints", 50 + len(key), 9, start=AUTO
        )  # another checkpoint than this run began with
        if not linked:
            assert "starts a run" in said(folders.settings(new.with_name(f"new-{key}"), **{key: place}))
        shutil.rmtree(place / "checkpoints" / f"step-{50 + len(key):08d}")


def test_a_path_is_where_a_run_starts(run: Path, other: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    for path in (other, other / "checkpoints", other / "checkpoints" / "step-00000006"):
        settings = folders.settings(new, resume=path)
        assert plan(settings) == Plan(other / "checkpoints" / "step-00000006", is_named=path.name.startswith("step"))
        made = go_on(settings, 9, 1)
        assert plan(settings) == Plan(made, is_own=True)
        folders.write(other / "checkpoints", 50, 3)  # the other run goes on, and loses what it started from
        assert plan(settings) == Plan(made, is_own=True)
        shutil.rmtree(other / "checkpoints" / "step-00000050")
        shutil.rmtree(new)
    settings = folders.settings(new, resume=tmp_path / "gone")
    assert "gone does not exist; name a checkpoint's folder, or a run's" in said(settings)
    made = folders.write(new / "checkpoints", 9, 1, start=AUTO | {"resume": str(tmp_path / "gone")})
    assert plan(settings) == Plan(made, is_own=True)  # what it was started from may be gone by then


def test_a_path_in_the_run_goes_back(run: Path) -> None:
    own = run / "checkpoints"
    settings = folders.settings(run, resume=own / "step-00000004")
    assert plan(settings) == Plan(own / "step-00000004", is_own=True, is_named=True)
    go_on(settings, 6, 3)
    assert step(plan(settings)) == 6
    assert step(plan(folders.settings(run, resume=run))) == step(plan(folders.settings(run, resume=own))) == 6


def test_a_new_start_does_not_mix_with_what_is_there(run: Path, other: Path, tmp_path: Path) -> None:
    for settings in (folders.settings(run, resume=other), folders.settings(run, weights=other)):
        text = said(settings)
        assert f"train.folder {run} has the checkpoints of another one, the newest step-00000008" in text
        (run / "checkpoints").rename(run / "moved")  # one of its remedies
        assert step(plan(settings)) == 6
        (run / "moved").rename(run / "checkpoints")
    both = folders.settings(run, resume="scratch", weights=other)
    assert plan(both) == Plan(other / "checkpoints" / "step-00000006", weights=True, aside=True)
    go_on(both, 1, 1)
    assert plan(both) == Plan(run / "checkpoints" / "step-00000001", is_own=True)
    assert "which checkpoint.resume scratch sets aside" in said(folders.settings(run, resume="scratch", weights=run))


def test_never_overwrites_none(run: Path, tmp_path: Path) -> None:
    text = said(folders.settings(run, resume="never"))
    assert (
        "step-00000008 exists and checkpoint.resume is never: take another train.folder, or checkpoint.resume auto"
        in text
    )
    assert "tensorboard" not in text and step(plan(folders.settings(run))) == 8  # its remedy
    assert plan(folders.settings(tmp_path / "new", resume="never")) == Plan()


def test_another_format_is_not_damaged(run: Path) -> None:
    from lsys.checkpoint.manifest import _digest

    path = run / "checkpoints" / "step-00000008" / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["sha256"]
    tree["format"] = 99
    path.write_text(json.dumps(tree | {"sha256": _digest(tree)}))
    text = said(folders.settings(run))
    assert "its format is 99, this lsys reads 1; load it with the lsys that wrote it" in text
    path.write_text(json.dumps(tree | {"sha256": "0"}))
    assert step(plan(folders.settings(run))) == 4  # a bit that made another format of it


def test_what_does_not_fit_is_told_with_the_other_mistakes(run: Path, other: Path, tmp_path: Path) -> None:
    changed = folders.settings(run, model__layers=2, optimizer__distributed=False)
    (mistake,) = mistakes(changed)
    for part in ("model.layers 4 in the checkpoint, 2 in the config", "optimizer.distributed true in the checkpoint"):
        assert part in str(mistake)
    assert mistake.is_local and str(mistake).startswith(
        f"checkpoint.resume: {run}/checkpoints/step-00000008 does not fit"
    )
    (mistake,) = mistakes(
        folders.settings(tmp_path / "new", weights=other, model__layers=2, optimizer__distributed=False)
    )
    assert "model.layers" in str(mistake) and "optimizer" not in str(mistake)  # weights are those of any optimizer
    assert mistakes(folders.settings(run)) == []


def test_two_starts_contradict_each_other(other: Path, tmp_path: Path) -> None:
    from lsys.config.rules import check

    (mistake,) = check(folders.settings(tmp_path, resume=other, weights=other), 1)
    assert mistake.key == "checkpoint.weights" and f"checkpoint.resume {other}: both say where the run starts" in str(
        mistake
    )
    assert check(folders.settings(tmp_path, resume="scratch", weights=other), 1) == []


def test_a_run_is_refused_with_all_its_mistakes_and_without_torch(run: Path, tmp_path: Path) -> None:
    import yaml

    from lsys.config.load import resolved

    (run / "checkpoints" / "step-00000008" / "common.pt").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    tree = resolved(folders.settings(run))
    tree["data"]["corpora"] = [{"path": str(tmp_path / "nowhere")}]
    tree["optimizer"]["warmup_steps"] = 100
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    code = f"import sys; from lsys.cli import main; print(main(['train', {str(tmp_path / 'run.yaml')!r}]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 False\n", done.stdout + done.stderr
    for part in ("3 mistakes", "optimizer.warmup_steps", "nowhere.bin", "has no whole checkpoint"):
        assert part in done.stderr


def test_a_folder_without_a_checkpoint_says_what_is_damaged(other: Path, tmp_path: Path) -> None:
    assert find_checkpoint(other / "checkpoints").path == find_checkpoint(other).path
    for path in (other / "checkpoints").iterdir():
        (path / "common.pt").unlink()
    with pytest.raises(CheckpointError, match="no run's folder with a whole one.*step-00000006: common.pt is missing"):
        find_checkpoint(other)
