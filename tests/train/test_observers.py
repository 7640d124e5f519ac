"""Observers lie in each other, and an optional one that fails is told and left out."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from lsys.train.observers import PAUSES, Observers, Splitting, StepObserver


class Noted(StepObserver):
    def __init__(self, name: str, notes: list[str], fails: str = "", required: bool = False) -> None:
        self.name, self.notes, self.fails, self.required = name, notes, fails, required

    def note(self, what: str) -> None:
        self.notes.append(f"{self.name} {what}")
        if what == self.fails:
            raise OSError("no space left")

    def begin_step(self, step: int) -> None:
        self.note(f"begin {step}")

    def end_step(self, done: Any) -> None:
        self.note(f"end {done.step}")

    @contextlib.contextmanager
    def paused(self, what: str) -> Any:
        self.note(what)
        yield
        self.note("on")

    def close(self, failed: bool) -> None:
        self.note("close")


def go(observers: Observers) -> None:
    with observers.paused("data"):
        pass
    observers.begin_step(1)
    observers.end_step(SimpleNamespace(step=1))  # type: ignore[arg-type]
    observers.close(False)


def test_they_lie_in_each_other() -> None:
    notes: list[str] = []
    go(Observers([Noted("a", notes), Noted("b", notes, required=True)], notes.append))
    assert notes == [
        "a data", "b data", "b on", "a on", "a begin 1", "b begin 1", "b end 1", "a end 1", "b close", "a close",
    ]  # fmt: skip


@pytest.mark.parametrize("fails", ["data", "on", "begin 1", "end 1", "close"])
def test_an_optional_ones_failure_is_told_once_and_a_required_ones_ends_the_run(fails: str) -> None:
    notes: list[str] = []
    told: list[str] = []
    go(Observers([Noted("a", notes, fails), Noted("b", notes, required=True)], told.append))
    assert len(told) == 1 and "Noted failed and is left out from now on: OSError: no space left" in told[0]
    assert notes[-1] in ("b close", "a close") and notes[notes.index(f"a {fails}") + 1 :].count("a close") == 0
    assert [note for note in notes if note[0] == "b"] == ["b data", "b on", "b begin 1", "b end 1", "b close"]
    with pytest.raises(OSError, match="no space"):
        go(Observers([Noted("a", notes), Noted("b", notes, fails, required=True)], told.append))
    assert len(told) == 1


def test_the_waterfall_knows_every_pause() -> None:
    from lsys.observe.waterfall_split import REGIONS

    assert set(Splitting.REGIONS) == set(PAUSES) and set(Splitting.REGIONS.values()) <= set(REGIONS)
