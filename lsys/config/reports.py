"""What the layers and losses of a run report: named values, how each is reduced, and the messages that bring them together.

A metric is declared here, or by what is listed in SOURCES, as a function of the configuration alone. So all ranks and stages, and the
predictor, know names and lengths without a message. What is reported is added up on the device; after a step one message for each
reduction operation (sums, maxima) goes over the data x context ranks, over the tensor ranks if a metric wants that, and over the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lsys.config.losses import layer_losses
from lsys.config.schema import Config

NUMBER = 8  # bytes: values are summed in fp64
LOSS, Z_LOSS, TOKENS = "loss_metrics/global_avg_loss", "loss_metrics/z_loss", "tokens"


@dataclass(frozen=True)
class Metric:
    """A named value that layers or a loss report during the forward passes of a step.

    Attributes:
        name: TensorBoard's tag. The numbers of a vector are `name/0`, `name/1` and so on.
        how: `sum`: of all that a step reports, mean of the steps since the last report. `mean`: all totals over all weights since then.
            `max`: the largest since then.
        size: how many numbers; 1 is a scalar.
        axes: of the ranks that report parts of the whole, of "tensor", "context" and "data". Along the others all ranks report the same,
            and the first one's counts. Stages are always brought together.
        weight: for a mean, name of the sum that it is divided by; None: the weights that are reported with it.
        last_stage: only the last stage reports it, as losses do. If that holds for all, their message is a broadcast.
        newest: the last step's value is shown instead of the interval's.
        shown: whether it is a curve. console: what it is called in the console's line; empty: it is not there.
    """

    name: str
    how: Literal["sum", "mean", "max"]
    size: int = 1
    axes: tuple[str, ...] = ("data", "context")
    weight: str | None = None
    last_stage: bool = False
    newest: bool = False
    shown: bool = True
    console: str = ""

    def __post_init__(self) -> None:
        if self.size < 1 or not {"tensor", "context", "data"}.issuperset(self.axes):
            raise ValueError(f"{self.name}: a metric has at least 1 number, and axes among tensor, context and data")
        if self.weight is not None and self.how != "mean":
            raise ValueError(f"{self.name} is a {self.how}: only a mean has a weight")

    @property
    def tags(self) -> tuple[str, ...]:
        """TensorBoard's tags, one for each number."""
        return (self.name,) if self.size == 1 else tuple(f"{self.name}/{place}" for place in range(self.size))


def losses(config: Config) -> Iterable[Metric]:
    """What the loss of next tokens reports: its parts for each token that counts, and how many do."""
    yield Metric(LOSS, "mean", weight=TOKENS, last_stage=True, newest=True)
    yield Metric(Z_LOSS, "mean", weight=TOKENS, last_stage=True, newest=True, shown=config.train.z_loss > 0)
    yield Metric(TOKENS, "sum", last_stage=True, newest=True, shown=False)


def added(config: Config) -> Iterable[Metric]:
    """What layers add to the loss. Each rank adds a part of its own, tensor ranks too."""
    for loss in layer_losses(config):
        yield Metric(loss.name, "sum", axes=("tensor", "context", "data"))


# What declares metrics.
SOURCES: list[Callable[[Config], Iterable[Metric]]] = [losses, added]


def declared(config: Config) -> tuple[Metric, ...]:
    """All metrics of a run, each once, in an order that follows from the configuration.

    Raises:
        ValueError: a name is declared in two ways, or a mean's weight is no sum of one number over the same ranks.
    """
    found: dict[str, Metric] = {}
    for metric in (metric for source in SOURCES for metric in source(config)):
        if found.setdefault(metric.name, metric) != metric:
            raise ValueError(f"{metric.name} is declared twice, as {found[metric.name]} and as {metric}")
    for metric in found.values():
        if metric.weight is not None:
            weight = found.get(metric.weight)
            if weight is None or (weight.how, weight.size, set(weight.axes)) != ("sum", 1, set(metric.axes)):
                raise ValueError(f"{metric.name}: {metric.weight} is no sum of one number over {metric.axes}")
    return tuple(found.values())


@dataclass(frozen=True)
class Message:
    """One reduction of a step: of so many numbers, over the tensor ranks too or not, from the last stage only or from all."""

    how: Literal["sum", "max"]
    numel: int
    over_tensor: bool
    last_stage: bool

    @property
    def bytes(self) -> int:
        return NUMBER * self.numel


class Slots:
    """Where each metric lies in the messages.

    Attributes:
        metrics: by name. sums, maxima: places of sums and totals, and of maxima, by name. weights: places of what means are divided by.
        messages: those that are sent, sums first.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = {metric.name: metric for metric in metrics}
        self.sums, self.maxima, self.weights = {}, {}, {}  # type: dict[str, slice], dict[str, slice], dict[str, slice]
        ends = {"sum": 0, "max": 0}

        def place(way: str, size: int) -> slice:
            ends[way] += size
            return slice(ends[way] - size, ends[way])

        for metric in metrics:
            way = "max" if metric.how == "max" else "sum"
            (self.maxima if way == "max" else self.sums)[metric.name] = place(way, metric.size)
            if metric.how == "mean" and metric.weight is None:
                self.weights[metric.name] = place(way, 1)
        self.weights |= {m.name: self.sums[m.weight] for m in metrics if m.weight is not None}
        self.messages = tuple(self._messages(ends["sum"], ends["max"]))

    def _messages(self, sums: int, maxima: int) -> Iterable[Message]:
        for how, numbers, names in (("sum", sums, self.sums), ("max", maxima, self.maxima)):
            if numbers:
                metrics = [self.metrics[name] for name in names]
                tensor = any("tensor" in metric.axes for metric in metrics)
                yield Message(how, numbers, tensor, all(metric.last_stage for metric in metrics))  # type: ignore[arg-type]

    def own(self, how: str) -> dict[str, list[slice]]:
        """The places of each metric in a message that are its own."""
        if how == "max":
            return {name: [place] for name, place in self.maxima.items()}
        return {
            name: [place, *([self.weights[name]] if self.metrics[name].weight is None and name in self.weights else [])]
            for name, place in self.sums.items()
        }
