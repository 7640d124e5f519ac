"""A save that fails costs no run, the last one is tried again, and SIGTERM finds everything saved, whenever it comes."""

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support import parity
from support.delays import StubData

from lsys.checkpoint.manifest import CheckpointError
from lsys.train import saving
from lsys.train.saving import PAUSES

WAY = "checkpoints"  # a file in the way of the folder of checkpoints stands for a disk that cannot be written


@dataclass(frozen=True)
class Case:
    """What happens in a run of `steps`.

    Attributes:
        freed: when the disk can be written: after that step; or after that pause, if negative; None: from the beginning.
        kills: (rank, what, which): that rank gets SIGTERM in the which-th "validation" batch or "save" of its run.
    """

    steps: int = 4
    every: int = 1
    validate_every: int = 0
    give_up: int = 3
    freed: int | None = None
    kills: tuple[tuple[int, str, int], ...] = ()


@dataclass
class Seen:
    """What a rank saw: `notes` as "save 2" and "point 2" (of a validation) in their order, what it printed, how it ended."""

    notes: list[str] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    said: str = ""
    error: str = ""
    step: int = 0
    is_done: bool = False


def run(rank: int, world_size: int, folder: str, case: Case) -> Seen:
    from lsys.checkpoint import state
    from lsys.config.schema import Checkpoint, Metrics
    from lsys.observe.reporter import Reporter
    from lsys.runtime import install_megatron

    install_megatron()
    import torch.distributed as dist

    from lsys.checkpoint import Checkpoints
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.observers import Stopping
    from lsys.train.run import Run

    seen, counts, way = Seen(), {"validation": 0, "save": 0}, Path(folder) / WAY
    if rank == 0 and case.freed is not None:
        way.parent.mkdir(exist_ok=True)
        way.write_text("in the way")

    def happens(what: str) -> None:
        counts[what] += 1
        for _ in range(case.kills.count((rank, what, counts[what]))):
            os.kill(os.getpid(), signal.SIGTERM)

    class Data(StubData):
        validation_steps = 3

        def validation(self) -> Iterator[Any]:
            for step in range(3):
                happens("validation")
                yield self.training(step)[0]

    def free() -> None:
        dist.barrier()
        if rank == 0:
            way.unlink()
        dist.barrier()

    def sleep(seconds: float) -> None:
        seen.pauses.append(seconds)
        if case.freed == -len(seen.pauses):
            free()

    write, save, heard = state.save_state, Checkpoints.save, Stopping.hear

    def written(*args: Any) -> Any:
        happens("save")
        return write(*args)

    def saved(self: Checkpoints, engine: Any, cursor: Any) -> Path:
        path = save(self, engine, cursor)
        seen.notes.append(f"save {cursor.step}")
        return path

    def ended(self: Stopping, done: Any) -> None:
        heard(self, done.step)
        if case.freed == done.step - 1:
            free()

    config = parity.settings(
        train__steps=case.steps, train__validate_every=case.validate_every, train__folder=Path(folder)
    )
    checkpoint = Checkpoint(every=case.every, give_up=case.give_up)
    metrics = Metrics(every=1, waterfall_every=0, tensorboard=False)
    config = config.model_copy(update={"metrics": metrics, "checkpoint": checkpoint})
    said, before = io.StringIO(), signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("lsys.train.data.open_data", Data))
        stack.enter_context(mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None))
        stack.enter_context(mock.patch.object(state, "save_state", written))
        stack.enter_context(mock.patch.object(saving, "time", SimpleNamespace(sleep=sleep)))
        stack.enter_context(mock.patch.object(Checkpoints, "save", saved))
        stack.enter_context(mock.patch.object(Stopping, "end_step", ended))
        point = lambda self, step, *_: seen.notes.append(f"point {step}")  # noqa: E731
        stack.enter_context(mock.patch.object(Reporter, "validation", point))
        groups = stack.enter_context(process_groups(config.parallel, Launch(rank=rank, world_size=world_size)))
        stack.enter_context(contextlib.redirect_stdout(said))
        whole = Run(config, groups)
        try:
            whole.train()
        except CheckpointError as error:
            seen.error = str(error)
    assert signal.getsignal(signal.SIGTERM) == before
    seen.said, seen.step, seen.is_done = said.getvalue(), whole.step, whole.is_done
    return seen


def both(gloo: Any, folder: Path, case: Case) -> Seen:
    """What the first rank saw of two; the other one went the same way."""
    first, second = gloo(2, run, str(folder / "run"), case)
    for name in ("notes", "pauses", "error", "step", "is_done"):
        assert getattr(first, name) == getattr(second, name), name
    return first


def test_a_save_that_fails_is_told_and_the_next_interval_saves(gloo: Any, tmp_path: Path) -> None:
    seen = both(gloo, tmp_path, Case(freed=2))  # two of at most three fail, and the count begins anew
    assert seen.notes == ["save 3", "save 4", "point 4"] and seen.is_done and not seen.pauses
    warned = [line for line in seen.said.splitlines() if line.startswith("warning: checkpoint step ")]
    assert [line.partition(" not written")[0][-1] for line in warned] == ["1", "2"]
    assert "File exists" in warned[0] and warned[0].endswith("1 save failed, 2 more may fail (checkpoint.give_up)")
    assert warned[1].endswith("the next interval saves again; 2 saves failed, 1 more may fail (checkpoint.give_up)")


FAILS, SAVES, LEFT_OUT = "fails", "saves", "is left out"


def faked(*outcomes: str) -> tuple[saving.Saves, Any, list[str]]:
    """Saves of a run whose saves go as said; the run; what it tells."""
    left, said = iter(outcomes), list[str]()

    def save() -> None:
        outcome = next(left)
        fake.updates.save_is_due = outcome == LEFT_OUT
        if outcome == FAILS:
            raise CheckpointError("full")

    fake: Any = SimpleNamespace(
        save=save,
        settings=SimpleNamespace(checkpoint=SimpleNamespace(give_up=3)),
        reporter=SimpleNamespace(say=said.append),
        updates=SimpleNamespace(save_is_due=False),
    )
    return saving.Saves(fake), fake, said


def test_a_save_that_succeeds_begins_the_count_anew() -> None:
    saves, _, said = faked(FAILS, FAILS, SAVES, FAILS, FAILS, SAVES, FAILS, LEFT_OUT, FAILS, FAILS)
    for _ in range(9):
        saves.at_interval()
    with pytest.raises(CheckpointError, match="^full; 3 saves failed one after another, as many as checkpoint.give_up"):
        saves.at_interval()
    assert len(said) == 6


def test_a_late_save_that_fails_waits_for_the_next_interval() -> None:
    """It is not tried at each step: a disk that is full for a while would end the run within give_up steps."""
    saves, run, said = faked(FAILS)
    run.updates.save_is_due = True  # left out before
    saves.at_interval()
    assert not run.updates.save_is_due and "the next interval saves again" in said[0]


def test_so_many_failures_in_a_row_end_the_run(gloo: Any, tmp_path: Path) -> None:
    seen = both(gloo, tmp_path, Case(give_up=2, freed=99))
    assert seen.step == 2 and not seen.notes and not seen.is_done and not seen.pauses
    assert "checkpoint step 2 not written" in seen.error and "2 saves failed one after another" in seen.error


def test_the_last_save_is_tried_again_and_never_passed_over(gloo: Any, tmp_path: Path) -> None:
    seen = both(gloo, tmp_path, Case(steps=3, every=2, give_up=0, freed=99))
    assert seen.step == 3 and seen.pauses == list(PAUSES) and not seen.is_done
    assert not seen.notes  # nor is the loss validated of what is not saved
    assert "checkpoint step 3 not written" in seen.error and "the last save of the run, in 4 attempts" in seen.error
    assert seen.said.count("it is the last save, and tried again in") == 3 and "checkpoint.give_up is 0" in seen.said


def test_a_disk_that_is_freed_in_a_pause_has_the_last_save(gloo: Any, tmp_path: Path) -> None:
    seen = both(gloo, tmp_path, Case(steps=2, every=0, freed=-2))
    assert seen.notes == ["save 2", "point 2"] and seen.pauses == list(PAUSES[:2]) and seen.is_done and not seen.error


@pytest.mark.fault("SIGTERM in validation", "SIGTERM twice in a save")
@pytest.mark.parametrize(
    "case, step, notes",
    [
        (Case(every=0, validate_every=2, kills=((1, "validation", 2),)), 2, ["save 2"]),
        (Case(every=2, validate_every=2, kills=((0, "validation", 1),)), 2, ["save 2"]),  # saved before it
        (Case(every=0, validate_every=2, kills=((1, "validation", 5),)), 4, ["point 2", "save 4"]),  # the final one
        (Case(every=2, validate_every=2, kills=((1, "save", 1),) * 3), 2, ["save 2"]),  # thrice in a save
        (Case(every=0, kills=((0, "save", 1),) * 2), 4, ["save 4"]),  # in the last one
        (
            Case(every=0, validate_every=2, kills=((1, "validation", 3), (0, "save", 1))),
            2,
            ["save 2"],
        ),  # in that of the first
    ],
)
def test_sigterm_loses_nothing(gloo: Any, tmp_path: Path, case: Case, step: int, notes: list[str]) -> None:
    seen = both(gloo, tmp_path, case)
    assert seen.notes == notes and seen.step == step and seen.is_done and not seen.error
    assert seen.said.count(f"SIGTERM: saving after step {step} and stopping") == 1
    assert seen.said.count(f"the validation of step {step} is given up") == 1
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == [f"step-{step:08d}"]
