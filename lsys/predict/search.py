"""Other degrees: the nearest that fit, and the fastest by the model of time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from lsys.config.messages import divisors
from lsys.config.rules import check
from lsys.config.schema import Config
from lsys.parallel.methods import STATE
from lsys.predict.hardware import Hardware
from lsys.predict.plan import Plan

Changes = dict[str, Any]  # by dotted key

RECOMPUTE = ("none", "selective", "full")


def changed(config: Config, changes: Changes) -> Config:
    """The configuration with these values."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates)


def overrides(changes: Changes) -> str:
    """The changes as options of the command line, such as `--parallel.tensor 2`."""
    words = (f"--{key.replace('_', '-')} {str(value).lower()}" for key, value in changes.items())
    return " ".join(words)


def _plan(plan: Plan, changes: Changes) -> Plan | None:
    """With these changes; None where rules refuse it."""
    config = changed(plan.config, changes)
    return None if check(config, plan.world_size) else Plan(config, plan.world_size, plan.hardware)


# ---- the nearest that fits


def nearest(plan: Plan) -> tuple[Changes, Plan] | None:
    """The fewest changes, of one or two keys, with which it fits; of several the fastest, or that of the least memory."""
    single = list(_single(plan))
    for count in (1, 2):
        fitting = []
        for chosen in combinations(single, count):
            if len({key for key, _ in chosen}) < count:
                continue
            other = _plan(plan, dict(chosen))
            if other is not None and other.fits:
                fitting.append((dict(chosen), other))
        if fitting:
            return min(fitting, key=lambda found: _rank(found[1]))
    return None


def _rank(plan: Plan) -> tuple[float, float]:
    """Time a token where it is known, then memory."""
    seconds = plan.prediction.seconds if plan.hardware.is_known else 0.0
    return seconds / plan.config.train.batch_tokens, max(plan.memory)


def _single(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Values of single keys that may save memory."""
    config, parallel = plan.config, plan.config.parallel
    for recompute in RECOMPUTE[RECOMPUTE.index(config.train.recompute) + 1 :]:
        yield "train.recompute", recompute
    if not config.optimizer.distributed:
        yield "optimizer.distributed", True
    for axis in ("tensor", "pipeline", "context"):
        degree = getattr(parallel, axis)
        for factor in (2, 4, 8):
            if axis != "tensor" or plan.hardware.ranks_per_node % (degree * factor) == 0:
                yield f"parallel.{axis}", degree * factor
    for part in (2, 4):
        if config.train.micro_batch_tokens % part == 0:
            yield "train.micro_batch_tokens", config.train.micro_batch_tokens // part


# ---- the fastest


def search(config: Config, world_size: int, hardware: Hardware, count: int = 5) -> list[tuple[Changes, Plan]]:
    """The fastest degrees that fit, fastest first; with rates unknown, none.

    Of recompute the least that fits is taken; the methods of layers with a state are tried on the best degrees.
    """
    start = Plan(config, world_size, hardware)
    if not hardware.is_known:
        return []
    found = [each for degrees in _degrees(config, world_size, hardware) if (each := _fitting(start, degrees))]
    found = sorted(found, key=lambda each: each[1].prediction.seconds)[: 4 * count]
    found = [_with_method(start, *each) for each in found]
    return sorted(found, key=lambda each: each[1].prediction.seconds)[:count]


def _degrees(config: Config, world_size: int, hardware: Hardware) -> Iterator[Changes]:
    """Degrees that can divide the ranks; tensor parallelism stays inside a node."""
    node = min(world_size, hardware.ranks_per_node)
    for tensor in divisors(math.gcd(world_size, node)):
        for pipeline in _up_to(divisors(world_size // tensor), config.model.layers):
            for context in _powers(world_size // tensor // pipeline):
                for virtual in (1, 2, 4) if pipeline > 1 else (1,):
                    values = (tensor, pipeline, virtual, context)
                    names = ("tensor", "pipeline", "virtual_pipeline", "context")
                    yield {f"parallel.{name}": value for name, value in zip(names, values, strict=True)}


def _up_to(values: Iterable[int], most: int) -> list[int]:
    return [value for value in values if value <= most]


def _powers(limit: int) -> Sequence[int]:
    """Divisors of what is left, without those that are neither powers of two nor the whole."""
    return [d for d in divisors(limit) if d & (d - 1) == 0 and d <= 256]


def _fitting(start: Plan, degrees: Changes) -> tuple[Changes, Plan] | None:
    """With the least recompute that fits."""
    for recompute in RECOMPUTE:
        changes = {**degrees, "train.recompute": recompute}
        plan = _plan(start, changes)
        if plan is None:
            return None
        if plan.fits:
            return changes, plan
    return None


def _with_method(start: Plan, changes: Changes, plan: Plan) -> tuple[Changes, Plan]:
    """With the fastest way of states."""
    config = plan.config
    if config.parallel.context == 1 or not any(card.has_state for card in config.model.cards.values()):
        return changes, plan
    methods = sorted(STATE, key=lambda method: method != config.parallel.linear)  # of equals the configured
    plans = [(each, _plan(start, each)) for each in ({**changes, "parallel.linear": method} for method in methods)]
    fitting = [(each, other) for each, other in plans if other is not None and other.fits]
    return min(fitting, key=lambda each: each[1].prediction.seconds, default=(changes, plan))
