"""Observers lie in each other, and an optional one that fails is told, closed and left out."""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from lsys.train.errors import RunError
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
    assert notes[-1] in ("b close", "a close")
    after = notes[notes.index(f"a {fails}") + 1 :]  # closed at once, and no more called
    assert [note for note in after if note[0] == "a"] == ["a close"] * (fails != "close")
    assert [note for note in notes if note[0] == "b"] == ["b data", "b on", "b begin 1", "b end 1", "b close"]
    with pytest.raises(OSError, match="no space"):
        go(Observers([Noted("a", notes), Noted("b", notes, fails, required=True)], told.append))
    assert len(told) == 1


def test_what_failed_is_closed_by_its_identity_whatever_closing_does() -> None:
    @dataclass
    class Alike(StepObserver):  # equal to any other one
        fails: bool = field(default=False, compare=False)
        closed: list[bool] = field(default_factory=list, compare=False)

        def end_step(self, done: Any) -> None:
            if self.fails:
                raise OSError("full")

        def close(self, failed: bool) -> None:
            self.closed.append(failed)
            if self.fails:
                raise ValueError("still full")

    told: list[str] = []
    well, ill = Alike(), Alike(fails=True)
    go(Observers([well, ill], told.append))
    assert well.closed == [False] and ill.closed == [True]
    assert [text.partition("Alike ")[2] for text in told] == [
        "failed and is left out from now on: OSError: full",
        "could not be closed either: ValueError: still full",
    ]


@pytest.mark.parametrize("fails", ["entering", "leaving"])
def test_what_was_entered_is_left_if_a_required_one_fails(fails: str) -> None:
    class Context(StepObserver):
        required = True

        def __init__(self, name: str, at: str = "") -> None:
            self.name, self.at = name, at

        def paused(self, what: str) -> Any:
            return self

        def __enter__(self) -> None:
            self.note("entering")

        def __exit__(self, *_: object) -> None:
            self.note("leaving")

        def note(self, what: str) -> None:
            notes.append(f"{self.name} {what}")
            if what == self.at:
                raise OSError("no space left")

    notes: list[str] = []
    observers = Observers([Context("a"), Context("b"), Context("c", fails)], notes.append)
    with pytest.raises(OSError, match="no space"), observers.paused("report"):
        notes.append("inside")
    inside = ["inside", "c leaving"] if fails == "leaving" else []
    assert notes == ["a entering", "b entering", "c entering", *inside, "b leaving", "a leaving"]
    observers.observers.pop()
    with observers.paused("report"):  # it goes on
        pass


def test_a_pause_in_another_one_is_refused_and_leaves_that_alone() -> None:
    notes: list[str] = []
    observers = Observers([Noted("a", notes)], notes.append)
    with observers.paused("report"):
        with pytest.raises(
            RunError, match=r'paused\("checkpoint"\) inside paused\("report"\): .*; end the outer one first'
        ):
            with observers.paused("checkpoint"):
                notes.append("inside")
        notes.append("still")
    with observers.paused("data"):
        pass
    assert notes == ["a report", "still", "a on", "a data", "a on"]


def test_the_waterfall_knows_every_pause() -> None:
    from lsys.observe.waterfall_split import REGIONS

    assert set(Splitting.REGIONS) == set(PAUSES) and set(Splitting.REGIONS.values()) <= set(REGIONS)
