"""The waterfalls of a whole run, read back from its curves: as TensorBoard's own reader finds them."""

import random
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lsys.observe.waterfall_history import WaterfallHistory, read_history

BASELINE = Path(__file__).parents[1] / "baseline" / "run" / "tensorboard"


def by_tensorboard(folder: Path, first_step: int) -> dict[int, dict[str, float]]:
    events = EventAccumulator(str(folder), {"scalars": 0})
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("waterfall/"):
            for point in events.Scalars(tag):
                if point.step < first_step:
                    found.setdefault(point.step, {})[tag[len("waterfall/") : -len("(%)")]] = point.value
    return found


def rows(history: WaterfallHistory) -> dict[int, dict[str, float]]:
    """Without parts that are zero, which a report may or may not have had."""
    return {
        step: {part: column[row] for part, column in history.shares.items() if column[row]}
        for row, step in enumerate(history.steps)
    }


def without_zeros(found: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {step: {part: share for part, share in parts.items() if share} for step, parts in sorted(found.items())}


def write(folder: Path, first: int, last: int, parts: list[str], seed: int) -> None:
    """As a run does from its step `first` on, among much else."""
    draws = random.Random(seed)
    writer = SummaryWriter(str(folder), purge_step=first)
    writer.add_text("config", "waterfall/compute(%) " * 500, first)
    for step in range(first, last + 1):
        writer.add_scalar("loss", 1.0, step)
        for part in parts:
            writer.add_scalar(f"waterfall/{part}(%)", draws.random(), step)
        writer.add_image("ranks/time", np.zeros((64, 64, 3), np.uint8), step, dataformats="HWC")
        writer.add_scalar("waterfall_more/x(%)", 1.0, step)
    writer.close()
    (path,) = (path for path in folder.glob("*tfevents*") if path.suffix != ".test")
    path.rename(folder / f"events.out.tfevents.{1000 + seed}.test")  # runs begin in different seconds


@pytest.mark.parametrize("first_step", [1, 20, 34, 100])
def test_a_run_that_was_resumed_thrice_is_read_as_tensorboard_reads_it(tmp_path: Path, first_step: int) -> None:
    write(tmp_path, 1, 40, ["compute", "exposed_context"], 1)
    write(tmp_path, 21, 50, ["compute", "exposed_data", "other"], 2)
    write(tmp_path, 26, 30, [], 3)
    write(tmp_path, 31, 36, ["compute"], 4)
    found = rows(read_history(tmp_path, first_step))
    assert found == without_zeros(by_tensorboard(tmp_path, first_step))
    assert list(found) == [step for step in (*range(1, 26), *range(31, 37)) if step < first_step]


def test_a_run_that_an_older_version_made_is_read() -> None:
    found = rows(read_history(BASELINE, 9))
    assert found == without_zeros(by_tensorboard(BASELINE, 9)) and len(found) >= 4


def test_a_file_that_ends_within_an_event_is_read_up_to_there(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, ["compute"], 1)
    (path,) = tmp_path.glob("*tfevents*")
    whole = path.read_bytes()
    lengths = []
    for size in range(len(whole) - 200, len(whole)):
        path.write_bytes(whole[:size])
        lengths.append(len(read_history(tmp_path, 100).steps))
    assert set(lengths) <= {4, 5} and lengths == sorted(lengths)
    assert read_history(tmp_path / "nowhere", 100).steps.tolist() == []


def test_a_long_history_is_means_of_neighbours() -> None:
    history = WaterfallHistory()
    for step in range(1, 1001):
        history.add(10 * step, {"compute": step, "data": 100.0} if step > 500 else {"compute": step})
    steps, shares = history.columns(300)
    assert steps.tolist() == [*range(40, 10_001, 40)]  # four each
    assert shares["compute"] == pytest.approx(np.arange(1, 1001).reshape(-1, 4).mean(1))
    assert shares["data"].tolist() == [0.0] * 125 + [100.0] * 125
    steps, shares = history.columns(999)
    assert len(steps) == 500 and history.columns(1000)[0].tolist() == history.steps.tolist()
    history.forget(15)
    assert history.steps.tolist() == [10] and {part: list(c) for part, c in history.shares.items()} == {
        "compute": [1.0], "data": [0.0]
    }  # fmt: skip
