"""When pictures are drawn, on a clock of the test's own."""

import numpy as np
import pytest

from lsys.observe.tensorboard import Pace


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_drawing_takes_a_hundredth_of_the_time_at_most_and_keeps_up_with_the_run() -> None:
    clock, drawn = Clock(), []
    pace = Pace(clock)
    while clock.now < 20_000:
        clock.now += 1.0
        if pace.is_due:
            with pace.drawing():
                clock.now += 2.5
            drawn.append(clock.now)
    assert drawn[0] == pytest.approx(100 + 2.5, abs=1)
    gaps = np.diff(drawn)
    assert gaps.min() >= 250 and 2.5 * len(drawn) <= 0.01 * clock.now
    assert (gaps <= np.maximum(253.5, 0.0205 * np.array(drawn[1:]) + 3.5)).all() and gaps[-1] > 350


def test_the_ranks_are_drawn_at_once_and_then_as_often_as_costs_a_hundredth() -> None:
    clock, drawn = Clock(), []
    pace = Pace(clock, first=0.0, missing=0.0)
    while clock.now < 20_000:
        if pace.is_due:
            with pace.drawing():
                clock.now += 0.1
            drawn.append(clock.now)
        clock.now += 1.0
    assert drawn[0] == 0.1 and np.diff(drawn).min() >= 10 and np.diff(drawn).max() <= 11.1 + 1e-6
