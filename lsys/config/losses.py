"""The final losses, torch-free: where each is, and what it exchanges and holds. And losses that layers add to it.

The loss of a step is the final one plus, for each declared `LayerLoss`, weight times its mean over the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lsys.config.schema import Config

CHUNK = 1024  # tokens whose logits the chunked loss makes at once


class CrossEntropy:
    """What a final loss is, as far as the predictor goes; this one makes all logits.

    Attributes:
        title: in sentences. source: its class, "package.module:Class"; called with the configuration.
        gathers: how often the tensor ranks gather the hidden states of a micro-batch for it, forward and backward.
        is_recomputed: whether its backward pass makes the logits again.
    """

    title = "all logits at once"
    source = "lsys.model.loss:CrossEntropy"
    gathers = 2
    is_recomputed = False

    @staticmethod
    def reductions(z_loss: float) -> tuple[int, ...]:
        """Bytes a slot of each sum or maximum over the tensor ranks."""
        return (4,) * (4 if z_loss else 3)

    @staticmethod
    def workspace(slots: float, hidden: int, vocab: float, itemsize: int, z_loss: float) -> float:
        """Most bytes alive in its passes (fp32 copies of bf16 logits; the z-loss's gradient), on a rank with so much of the vocabulary."""
        logits = slots * vocab
        most = 6 * logits if itemsize == 2 else (12 if z_loss else 4) * logits
        return max(most, itemsize * (logits + slots * hidden + vocab * hidden))


class Chunked(CrossEntropy):
    """Cross-entropy of so many tokens at a time; the logits are made again in the backward pass."""

    title = f"the same, with the logits of {CHUNK} tokens at a time, made again in the backward pass"
    source = "lsys.model.chunked_loss:ChunkedCrossEntropy"
    gathers = 1
    is_recomputed = True

    @staticmethod
    def reductions(z_loss: float) -> tuple[int, ...]:
        return (4, 8)

    @staticmethod
    def workspace(slots: float, hidden: int, vocab: float, itemsize: int, z_loss: float) -> float:
        logits = min(slots, CHUNK) * vocab
        product = itemsize * vocab * hidden if itemsize == 2 else 0  # a chunk's, before it is added in fp32
        return (6 if itemsize == 2 else 4) * logits + 4 * vocab * hidden + product + 2 * itemsize * slots * hidden


# The final losses by their names in `train.loss`.
LOSSES: dict[str, type[CrossEntropy]] = {"cross_entropy": CrossEntropy, "chunked_cross_entropy": Chunked}


@dataclass(frozen=True)
class LayerLoss:
    """A loss that layers add to the final one: weight x total / count, of all that they add in a step, over all ranks and micro-batches.

    Attributes:
        name: what it is reported under, as total / count without the weight: TensorBoard's tag.
        weight: its factor in the loss of the step, beside the final loss's mean over the targets that count.
        count: what is counted over the step: "tokens": all tokens of documents; "targets": those that count, as for the final loss; or a
            function of a rank's micro-batch (`lsys.data.plan.RankBatch`) to how many it has, a number or a scalar tensor. It has to follow
            from the data alone: it is summed over the ranks before the step, since backward passes begin before the last forward pass.
    """

    name: str
    weight: float
    count: Literal["tokens", "targets"] | Callable[[Any], Any] = "tokens"

    @property
    def counted(self) -> Any:
        """What tells one count from another: of a function, where it is written and what it holds; it is made anew at each asking."""
        function = getattr(self.count, "__func__", self.count)
        if not isinstance(function, FunctionType):
            return self.count
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        of = getattr(self.count, "__self__", None)
        return function.__module__, function.__code__, function.__defaults__, function.__kwdefaults__, of, held


# What declares losses of layers beside the cards.
SOURCES: list[Callable[[Config], Iterable[LayerLoss]]] = []


def declarations(config: Config) -> Iterator[tuple[str, Callable[[], Iterable[LayerLoss]]]]:
    """(key of what declares losses, or "" where it has none; what gives them)."""
    for card in (*config.model.known_cards.values(), *config.model.known_channel_cards.values()):
        yield f"model.mixers.{card.key}", card.losses
    for source in SOURCES:
        yield "", partial(source, config)


def layer_losses(config: Config) -> tuple[LayerLoss, ...]:
    """All that layers of a run add to the loss, each once, in an order that follows from the configuration.

    Of a name that is declared in two ways, the first: `lsys.config.reports.mistakes` refuses that.
    """
    found: dict[str, LayerLoss] = {}
    for _, declare in declarations(config):
        for loss in declare():
            found.setdefault(loss.name, loss)
    return tuple(found.values())


def final(config: Config) -> type[CrossEntropy]:
    """The configured final loss; one that is not in the table is taken to need what the first does."""
    return LOSSES.get(config.train.loss, CrossEntropy)
