"""Loop, checkpoints and reports know of an engine what its protocol says: a second one, of plain PyTorch, trains, saves and resumes."""

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support import parity
from support.plain_engine import Data, plain_engine


def run(
    rank: int, world_size: int, folder: str, steps: int, broken: tuple[int, ...] = ()
) -> tuple[str, list[tuple[float, float, float]]]:
    """What the loop prints, and loss, norm and learning rate of the steps that it ran."""
    from lsys.config.schema import Checkpoint, Metrics
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.errors import RunError
    from lsys.train.observers import Observers
    from lsys.train.run import Run

    config = parity.settings(train__steps=steps, train__validate_every=2, train__folder=Path(folder))
    metrics = Metrics(every=1, waterfall_every=0)
    config = config.model_copy(update={"metrics": metrics, "checkpoint": Checkpoint(every=2)})
    said, seen = io.StringIO(), []
    original = Observers.end_step

    def end_step(self: Any, done: Any) -> None:
        seen.append((done.losses.mean, done.grad_norm, done.lr))
        original(self, done)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("lsys.train.data.open_data", Data))
        stack.enter_context(mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None))
        stack.enter_context(mock.patch.object(Observers, "end_step", end_step))
        groups = stack.enter_context(process_groups(config.parallel, Launch(rank=rank, world_size=world_size)))
        stack.enter_context(contextlib.redirect_stdout(said))
        try:
            Run(config, groups, make_engine=lambda settings, groups: plain_engine(settings, groups, broken)).train()
        except RunError as error:
            return str(error), seen
    return said.getvalue(), seen


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_engine_trains_saves_and_resumes(gloo: Any, tmp_path: Path, ranks: int) -> None:
    straight = gloo(ranks, run, str(tmp_path / "a"), 4)
    assert straight[0][0].count("| loss ") == 4 and straight[0][0].count("validation loss") == 2
    first = gloo(ranks, run, str(tmp_path / "b"), 2)
    second = gloo(ranks, run, str(tmp_path / "b"), 4)
    assert "resumed after step 2 of 4" in second[0][0]
    for whole, one, two in zip(straight, first, second, strict=True):
        assert one[1] + two[1] == whole[1] and len({loss for loss, _, _ in whole[1]}) == 4
    assert straight[0][1][0][2] == 4 * straight[0][1][3][2]  # the engine's own schedule


def test_megatrons_engine_has_the_protocol() -> None:
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.train.engine import Engine
    from lsys.train.protocol import TrainingEngine

    for name in dir(TrainingEngine):
        if not name.startswith("_") and name not in ("settings", "groups", "chunks"):
            assert hasattr(Engine, name), name
