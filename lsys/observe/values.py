"""Values that layers and losses report: collected on the device, brought together once a step, read over an interval."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lsys.config.reports import Message, Metric, Slots
from lsys.observe.added_loss import Added, Pending, Scale
from lsys.runtime.groups import Groups


class Pass:
    """One forward pass of one pipeline chunk, as its modules see it: where they report.

    A layer that is recomputed runs again in backward, with the micro-batch of its first run. Its pass has ended by then, and what it
    reports again is dropped: so everything counts once, whatever is recomputed.

    Attributes:
        has_ended: whether a layer that runs now is recomputed.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector: Collector | None = collector
        self._scales, self._pending = collector.scales, collector.pending

    @property
    def has_ended(self) -> bool:
        return self._collector is None

    def report(self, name: str, value: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Add to a declared metric; see `Collector.add`."""
        if self._collector is not None:
            self._collector.add(name, value, weight)

    def add_loss(self, name: str, total: Tensor, through: Tensor) -> Tensor:
        """Add to a declared loss; see `lsys.model.packed.PackedMicroBatch.add_loss`."""
        scale = self._scales.get(name)
        if scale is None:
            declared = ", ".join(self._scales) or "none"
            raise ValueError(f"{name} is added to the loss but not declared (a card's `losses`); there are {declared}")
        if total.numel() != 1 or total.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {total.dtype} {list(total.shape)}: what is added to the loss is one number, fp32"
            )
        self.report(name, total.detach())
        if not (torch.is_grad_enabled() and total.requires_grad):
            return through
        made: Tensor = Added.apply(through, total, scale.factor, name, self._pending)
        return made

    def end(self) -> None:
        self._collector = None


class Collector:
    """What this rank reports in the forward passes of one step, on its device. Nothing waits for that before `reduce`.

    Args:
        slots: of the run's metrics. scales: of what layers add to the loss.
    """

    def __init__(self, slots: Slots, groups: Groups, scales: Mapping[str, Scale] | None = None) -> None:
        self.slots, self.groups, self.scales, self.pending = slots, groups, scales or {}, Pending()
        lengths = {message.how: message.numel for message in slots.messages}
        self.sums = torch.zeros(lengths.get("sum", 0), dtype=torch.float64, device=groups.device)
        self.maxima = torch.full((lengths.get("max", 0),), -math.inf, dtype=torch.float64, device=groups.device)

    @contextlib.contextmanager
    def forward(self) -> Iterator[Pass]:
        """The pass that goes on inside."""
        one = Pass(self)
        try:
            yield one
        finally:
            one.end()

    def add(self, name: str, value: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Add to a metric.

        Args:
            value: a tensor of the metric's size, or a number. Of a mean, the total: the sum of what it is the mean of, so that a rank
                without tokens reports zero of zero.
            weight: of a mean that has its own: how many (or how heavy) they are.

        Raises:
            ValueError: the metric is not declared, or declared otherwise.
        """
        metric = self.slots.metrics.get(name)
        if metric is None:
            declared = ", ".join(self.slots.metrics)
            raise ValueError(f"{name} is reported but not declared (lsys.config.reports); there are {declared}")
        self._check(metric, value, weight)
        with torch.no_grad():
            if metric.how == "max":
                place = self.maxima[self.slots.maxima[name]]
                place.copy_(place.maximum(value.reshape(-1)) if isinstance(value, Tensor) else place.clamp(min=value))
                return
            self._sum(self.slots.sums[name], value)
            if weight is not None:
                self._sum(self.slots.weights[name], weight)

    def _sum(self, place: slice, value: Tensor | float) -> None:
        self.sums[place].add_(value.detach().reshape(-1) if isinstance(value, Tensor) else value)

    def _check(self, metric: Metric, value: Tensor | float, weight: Tensor | float | None) -> None:
        size = value.numel() if isinstance(value, Tensor) else 1
        if size != metric.size:
            raise ValueError(f"{metric.name} is declared with {metric.size} numbers, and {size} are reported")
        if (weight is not None) != (metric.how == "mean" and metric.weight is None):
            wanted = "a weight is to be reported with each total" if weight is None else "it takes no weight"
            raise ValueError(f"{metric.name} is a {metric.how}: {wanted}")
        if metric.last_stage and not self.groups.is_last_stage:
            raise ValueError(f"{metric.name} is declared as the last stage's, and another one reports it")

    def reduce(self) -> Values:
        """The values of all ranks, on each of them (collective; one wait for the device)."""
        parts = {"sum": self.sums, "max": self.maxima}
        for message in self.slots.messages:
            self._bring_together(message, parts[message.how])
        counts = [scale.counted.reshape(1) for scale in self.scales.values()]  # of all ranks already
        numbers = torch.cat((self.sums, self.maxima, *counts)).tolist()
        first, last = len(self.sums), len(self.sums) + len(self.maxima)
        return Values(
            self.slots, 1, numbers[:first], numbers[first:last], dict(zip(self.scales, numbers[last:], strict=True))
        )

    def _bring_together(self, message: Message, numbers: Tensor) -> None:
        groups, is_sum = self.groups.collection, message.how == "sum"
        operation = dist.ReduceOp.SUM if is_sum else dist.ReduceOp.MAX
        for place in self._copies(message):
            numbers[place].fill_(0.0 if is_sum else -math.inf)
        dist.all_reduce(numbers, operation, group=groups.dp_cp)
        if message.over_tensor:
            dist.all_reduce(numbers, operation, group=groups.tp)
        if message.last_stage:
            dist.broadcast(numbers, dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
        else:
            dist.all_reduce(numbers, operation, group=groups.pp)

    def _copies(self, message: Message) -> Iterator[slice]:
        """The numbers that another rank of the message reports as well: a metric has parts along its own axes only."""
        groups = self.groups.collection
        ranks = {"data": groups.dp.rank(), "context": groups.cp.rank()}
        if message.over_tensor:
            ranks["tensor"] = groups.tp.rank()
        for name, places in self.slots.own(message.how).items():
            if any(rank and axis not in self.slots.metrics[name].axes for axis, rank in ranks.items()):
                yield from places


@dataclass(frozen=True)
class Values:
    """What all ranks reported together in one step, or in several; or in the batches of a validation.

    Attributes:
        steps: how many. sums: of all of them. maxima: over all of them.
        counts: of all of them, what the losses that layers add are divided by, by name.
    """

    slots: Slots
    steps: int
    sums: Sequence[float]
    maxima: Sequence[float]
    counts: Mapping[str, float] = field(default_factory=dict)

    def followed_by(self, later: Values) -> Values:
        """Both together."""
        sums = [a + b for a, b in zip(self.sums, later.sums, strict=True)]
        maxima = [math.nan if math.isnan(a + b) else max(a, b) for a, b in zip(self.maxima, later.maxima, strict=True)]
        counts = {name: count + later.counts[name] for name, count in self.counts.items()}
        return Values(self.slots, self.steps + later.steps, sums, maxima, counts)

    def total(self, name: str) -> float:
        """A scalar's sum, of a mean before it is divided."""
        return self.sums[self.slots.sums[name]][0]

    def of(self, name: str) -> tuple[float, ...]:
        """A metric's numbers, over all steps together; none for a maximum that nothing was reported of, or a mean without weight.

        A sum that nothing was reported of is 0, and so is a mean whose declared weight is another sum.
        """
        metric = self.slots.metrics[name]
        if metric.how == "max":
            found = self.maxima[self.slots.maxima[name]]
            return () if all(value == -math.inf for value in found) else tuple(found)
        divisor = self.sums[self.slots.weights[name]][0] if metric.how == "mean" else float(self.steps)
        divisor = self.counts.get(name, divisor)
        return tuple(value / divisor for value in self.sums[self.slots.sums[name]]) if divisor else ()

    def shown(self, newest: Values) -> dict[str, float]:
        """The curves' points of a report on an interval, whose last step gave `newest`: some metrics show that alone."""
        return {
            tag: value
            for metric in self.slots.metrics.values()
            if metric.shown
            for tag, value in zip(metric.tags, (newest if metric.newest else self).of(metric.name), strict=False)
        }

    @property
    def curves(self) -> dict[str, float]:
        """Points of TensorBoard's curves, by tag, each of all steps; metrics that have no numbers (`of`) are left out."""
        return self.shown(self)
