"""An engine of plain PyTorch, and the data of its run."""

import contextlib
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch

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
