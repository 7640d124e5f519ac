"""What an engine is to the loop, the checkpoints and the reports: all that they know of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lsys.checkpoint.held import Held
from lsys.config.reports import LOSS, TOKENS, Z_LOSS
from lsys.observe.values import Values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lsys.data.plan import RankBatch


@dataclass(frozen=True)
class Losses:
    """Sums over the tokens of a step that count, over all ranks; beside them, all that layers and the loss reported."""

    entropy: float
    z_loss: float
    tokens: int
    values: Values

    @classmethod
    def of(cls, values: Values) -> Losses:
        return cls(values.total(LOSS), values.total(Z_LOSS), round(values.total(TOKENS)), values)

    @property
    def mean(self) -> float:
        """Cross-entropy per token, nats."""
        return self.entropy / max(self.tokens, 1)

    @property
    def are_finite(self) -> bool:
        """Whether all that was differentiated is: the final loss, its z-loss, and what layers add."""
        return all(map(math.isfinite, (self.entropy, self.z_loss, *map(self.values.total, self.values.counts))))


@dataclass(frozen=True)
class Update:
    """What a step of the optimizer did.

    Attributes:
        norm: of the gradients of the whole model, before clipping.
        applied: whether parameters changed; not, if the loss, a gradient or the norm was not finite.
    """

    norm: float
    applied: bool


class TrainingEngine(Held, Protocol):
    """One rank's share of a model and its optimizer. All methods are collective.

    `lsys.train.engine.Engine` is Megatron's. Another one is a callable (settings, groups) -> TrainingEngine for `lsys.train.run.Run`.

    Attributes:
        chunks: the modules of this rank, whose names traces show.
        learning_rate: of the next step.
    """

    @property
    def chunks(self) -> Sequence[nn.Module]: ...

    @property
    def learning_rate(self) -> float: ...

    def forward_backward(self, batches: Sequence[RankBatch], *, forward_only: bool = False) -> Losses:
        """The losses over all ranks, equal on all of them; after it gradients are there, unless forward_only.

        Args:
            batches: this data replica's micro-batches as this context rank sees them.
        """

    def step(self) -> Update:
        """Clip, update, advance the schedule; the norm is equal on all ranks, and so is whether the update was applied.

        Where the loss of the last `forward_backward` or the norm is not finite, no parameter, moment, decay or count of the optimizer
        changes; the schedule advances alike.
        """

    def find_not_finite(self, batches: Sequence[RankBatch]) -> str:
        """After an update that was not applied: where it arose, with the parameter, module or loss and the rank, equal on all ranks.

        Args:
            batches: of that step. They may be run once more; nothing of the run is changed by that.
        """

    def numbers(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what a checkpoint holds of this rank and has to be finite: parameters, copies, moments. Parameters are settled."""

    def settled_parameters(self) -> AbstractContextManager[None]:
        """Inside, parameters are whole and current: for validation and checkpoints."""
