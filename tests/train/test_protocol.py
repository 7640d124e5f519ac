"""Loop, checkpoints and reports know of an engine what its protocol says: a second one, of plain PyTorch, trains, saves and resumes."""

import contextlib
import io
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import parity
from support.delays import StubData


class Data(StubData):
    """With one validation step."""

    validation_steps = 1

    def validation(self) -> Iterator[Any]:
        yield self.training(4)[0]


def plain_engine(settings: Any, groups: Any, broken: tuple[int, ...] = ()) -> Any:
    """An embedding, a product and Adam, data-parallel; it has no public attribute but those of the protocol.

    Args:
        broken: steps whose updates are not applied.
    """
    import torch.distributed as dist
    import torch.nn.functional as F

    from lsys.config.reports import Slots, declared
    from lsys.observe.values import Values
    from lsys.train.protocol import Losses, TrainingEngine, Update

    class Plain:
        def __init__(self) -> None:
            self.settings, self.groups = settings, groups
            torch.manual_seed(0)
            vocab, hidden = settings.model.vocab, settings.model.hidden
            self._model = torch.nn.Sequential(torch.nn.Embedding(vocab, hidden), torch.nn.Linear(hidden, vocab))
            self.chunks = [self._model]
            self._adam = torch.optim.Adam(self._model.parameters(), lr=settings.optimizer.lr)
            self._steps = 0

        @property
        def learning_rate(self) -> float:
            return settings.optimizer.lr / (1 + self._steps)

        def forward_backward(self, batches: Sequence[Any], *, forward_only: bool = False) -> Losses:
            sums = torch.zeros(3)
            self._adam.zero_grad()
            for batch in batches:
                count = len(batch.loss_mask)
                logits = self._model(batch.tokens[:count])
                loss = (F.cross_entropy(logits, batch.targets[:count], reduction="none") * batch.loss_mask).sum()
                if not forward_only:
                    loss.backward()
                sums += torch.stack((loss.detach(), torch.zeros(()), batch.loss_mask.sum()))
            dist.all_reduce(sums)
            for parameter in self._model.parameters() if not forward_only else ():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= sums[2]
            found = sums.tolist()
            return Losses.of(Values(Slots(declared(settings)), 1, found, []))

        def step(self) -> Update:
            norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0))
            applied = self._steps + 1 not in broken
            for group in self._adam.param_groups:
                group["lr"] = self.learning_rate
            if applied:
                self._adam.step()
            self._steps += 1
            return Update(norm, applied)

        def find_not_finite(self, batches: Sequence[Any]) -> str:
            return "the gradient of a product"

        def numbers(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield from self._model.named_parameters()

        @contextlib.contextmanager
        def settled_parameters(self) -> Iterator[None]:
            yield

        def state(self, *, loading: bool) -> dict[str, Any]:
            if loading:  # nothing is cut
                return {}
            return {"model": self._model.state_dict(), "adam": self._adam.state_dict(), "steps": self._steps}

        def load_state(self, state: dict[str, Any]) -> None:
            self._model.load_state_dict(state["model"])
            self._adam.load_state_dict(state["adam"])
            self._steps = state["steps"]

        def weights_state(self, stored: Container[str]) -> dict[str, Any]:
            return {}

        def load_weights(self, state: dict[str, Any]) -> None:
            self._model.load_state_dict(state["model"])

    made: TrainingEngine = Plain()
    members = {*dir(TrainingEngine), *TrainingEngine.__annotations__}
    assert {name for name in dir(made) if not name.startswith("_")} <= members
    return made


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
