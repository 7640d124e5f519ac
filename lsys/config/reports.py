"""What the layers and losses of a run report: named values, how each is reduced, and the messages that bring them together.

A metric is declared here, or by what is listed in SOURCES, as a function of the configuration alone. So all ranks and stages, and the
predictor, know names and lengths without a message. What is reported is added up on the device; after a step one message for each
reduction operation (sums, maxima) goes over the data x context ranks, over the tensor ranks if a metric wants that, and over the stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from lsys.config.losses import LayerLoss, declarations, layer_losses
from lsys.config.messages import ConfigError, Mistake
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
        ConfigError: there are `mistakes`.
    """
    if found := [*mistakes(config)]:
        raise ConfigError(found)
    return tuple({metric.name: metric for source in SOURCES for metric in source(config)}.values())


def final_parts(config: Config) -> tuple[str, ...]:
    """Names that the final loss may report its sums under; LOSS comes first, and is always there."""
    metrics = (metric for source in SOURCES if source is not added for metric in source(config))
    return tuple(metric.name for metric in metrics if metric.last_stage and metric.name != TOKENS)


SKIPPED = "train/skipped_steps"  # updates that were not made since they were not finite, over the whole run
# Curves that a run has beside what is declared, and groups of curves, the first part of their names.
CURVES = frozenset(
    {"grad_norm", "lr", "n_tokens_seen", "throughput(tps)", "tflops", "mfu(%)", "loss_metrics/validation_loss", SKIPPED}
)
GROUPS = frozenset({"comm", "memory", "ranks", "scaling", "time_metrics", "validation", "waterfall"})


def is_own(tag: str) -> bool:
    """Whether a curve's name is one that lsys takes for itself."""
    return tag in CURVES or tag.partition("/")[0] in GROUPS


def mistakes(config: Config) -> Iterator[Mistake]:
    """What is wrong with what layers and losses declare: names that are taken, losses that cannot be counted or weighed."""
    metrics: dict[str, Metric] = {}  # by tag
    for metric in (metric for source in SOURCES if source is not added for metric in source(config)):
        for tag in dict.fromkeys((metric.name, *metric.tags)):
            if is_own(tag):
                yield Mistake("", f"{tag} is declared, and is a curve that every run has", "take another name")
            elif metrics.setdefault(tag, metric) != metric:
                yield Mistake("", f"{tag} is declared twice, as {metrics[tag]} and as {metric}", "take another name")
    for metric in dict.fromkeys(metrics.values()):
        weight = metrics.get(metric.weight or "")
        is_sum = weight is not None and (weight.how, weight.size, {*weight.axes}) == ("sum", 1, {*metric.axes})
        if metric.weight is not None and not is_sum:
            yield Mistake("", f"{metric.name}: {metric.weight} is no sum of one number over {metric.axes}")
    known: dict[str, tuple[str, LayerLoss]] = {}
    for key, declare in declarations(config):
        try:
            for loss in declare():
                problem = _wrong_loss(loss, metrics)
                if problem := problem or _contradiction(loss, *known.setdefault(loss.name, (key, loss))):
                    yield Mistake(key, *problem, is_local=bool(key))
        except Exception as error:  # the user's own code
            yield Mistake(key, f"its losses() raised {type(error).__name__}: {error}", GIVES, is_local=bool(key))


GIVES = "losses() gives LayerLoss of lsys.config.losses"


def _wrong_loss(loss: Any, metrics: Iterable[str]) -> tuple[str, str] | None:
    """(what is wrong with a loss by itself, what would do)."""
    if not isinstance(loss, LayerLoss):
        return f"its losses() gives {loss!r}", GIVES
    if not (isinstance(loss.name, str) and loss.name):
        return f"a loss is called {loss.name!r}", 'a curve has its name: give it a text, such as f"{self.key}/balance"'
    if is_own(loss.name) or loss.name in metrics:
        return f"the loss {loss.name!r} has the name of something else that a run reports", _name_by_key(loss)
    if not (isinstance(loss.weight, Real) and math.isfinite(loss.weight)):
        return f"the loss {loss.name!r} has the weight {loss.weight!r}", "a weight is a finite number"
    if loss.count not in ("tokens", "targets") and not callable(loss.count):
        return (
            f"the loss {loss.name!r} counts {loss.count!r}",
            "there are 'tokens', 'targets', or a function of a micro-batch",
        )
    return None


def _contradiction(loss: LayerLoss, key: str, first: LayerLoss) -> tuple[str, str] | None:
    """(what is otherwise in another declaration of the name, what would do)."""
    if loss.weight != first.weight:
        differs = f"has the weight {loss.weight}, and {first.weight}"
    elif loss.counted != first.counted:
        texts = [
            each if isinstance(each, str) else getattr(each, "__qualname__", repr(each))
            for each in (loss.count, first.count)
        ]
        differs = f"counts by {texts[0]}, and " + (
            "by that with other values" if texts[0] == texts[1] else f"by {texts[1]}"
        )
    else:
        return None
    return (
        f"the loss {loss.name!r} {differs} in {key or 'another declaration'}",
        f"a name has one of each; {_name_by_key(loss)}",
    )


def _name_by_key(loss: LayerLoss) -> str:
    return f'the card may name it by its section: f"{{self.key}}/{loss.name}"'


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
