"""What a validation shows is of all its batches together, however uneven they are."""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import parity

from lsys.config import reports
from lsys.config.losses import LayerLoss
from lsys.config.reports import LOSS, TOKENS, Z_LOSS, Metric, Slots
from lsys.observe.meter import Meter
from lsys.observe.values import Values
from lsys.train.observers import Observers, Reporting, Saving, StepDone, Validation
from lsys.train.protocol import Losses

OF_TOKENS = (LOSS, Z_LOSS, "a/weighed", "balance")  # means over the tokens
DECLARED = [
    Metric("a/own", "mean", size=2),
    Metric("a/weighed", "mean", weight=TOKENS, last_stage=True),
    Metric("a/sum", "sum"),
    Metric("a/max", "max"),
]


def random_tokens(count: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """What is reported of so many tokens, each by itself."""
    each = {name: random.gamma(2.0, size=count) for name in (*OF_TOKENS, "a/max")}
    return each | {"own": random.normal(size=(count, 2)), "weight": random.gamma(1.0, size=count)}


def values_of(slots: Slots, each: dict[str, np.ndarray]) -> Values:
    """The same as a batch's values."""
    sums = [0.0] * slots.messages[0].numel
    for name in OF_TOKENS:
        sums[slots.sums[name]] = [each[name].sum()]
    sums[slots.sums[TOKENS]] = sums[slots.sums["a/sum"]] = [len(each["own"])]
    sums[slots.sums["a/own"]] = (each["own"] * each["weight"][:, None]).sum(0)
    sums[slots.weights["a/own"]] = [each["weight"].sum()]
    return Values(slots, 1, sums, [each["a/max"].max()], {"balance": len(each["own"])})


def known(tokens: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The curves of these batches, by numpy over all their tokens."""
    whole = {name: np.concatenate([each[name] for each in tokens]) for name in tokens[0]}
    own = np.average(whole["own"], axis=0, weights=whole["weight"])
    found = {name: whole[name].mean() for name in OF_TOKENS}
    more = {"a/sum": len(whole["own"]) / len(tokens), "a/max": whole["a/max"].max()}
    return found | more | {"a/own/0": own[0], "a/own/1": own[1]}


def slots_of_a_run() -> Slots:
    with (
        mock.patch.object(reports, "SOURCES", [*reports.SOURCES, lambda _: DECLARED]),
        mock.patch.object(reports, "layer_losses", lambda _: [LayerLoss("balance", 0.1)]),
    ):
        return Slots(reports.declared(parity.settings(train__z_loss=1e-3)))


def test_a_validation_shows_what_its_batches_give_together() -> None:
    random, slots, shown = np.random.default_rng(0), slots_of_a_run(), []
    tokens = [random_tokens(count, random) for count in (1000, 10, 90)]
    batches = [values_of(slots, each) for each in tokens]
    run: Any = SimpleNamespace(
        settings=SimpleNamespace(train=SimpleNamespace(validate_every=1, steps=9)),
        is_stopping=False,
        data=SimpleNamespace(validation_steps=3, validation=lambda: batches, bigram_entropy=None),
        engine=SimpleNamespace(
            settled_parameters=contextlib.nullcontext,
            forward_backward=lambda batch, forward_only: SimpleNamespace(values=batch),
        ),
        observers=Observers([], print),
        groups=SimpleNamespace(launch=SimpleNamespace(rank=0)),
        reporter=SimpleNamespace(validation=lambda *told: shown.append(told)),
    )
    stopping: Any = SimpleNamespace(hear=lambda step: False)
    Validation(run, stopping, Saving(run)).end_step(SimpleNamespace(step=1))  # type: ignore[arg-type]
    ((_, loss, _, curves),) = shown
    assert curves == pytest.approx(known(tokens), rel=1e-12) and loss == pytest.approx(curves[LOSS], rel=1e-12)


def test_of_an_interval_of_training_the_loss_is_the_newest_steps() -> None:
    random, slots, shown = np.random.default_rng(1), slots_of_a_run(), []
    tokens = [random_tokens(count, random) for count in (1000, 10)]
    run: Any = SimpleNamespace(
        settings=SimpleNamespace(metrics=SimpleNamespace(every=2), train=SimpleNamespace(steps=9, batch_tokens=1)),
        data=SimpleNamespace(flops_of_all=float, position=SimpleNamespace(tokens_seen=int)),
        observers=Observers([], print),
        updates=SimpleNamespace(skipped=0),
    )
    reporter: Any = SimpleNamespace(training=lambda step, interval, curves, waterfall: shown.append(curves))
    reporting = Reporting(run, reporter, Meter(), SimpleNamespace(take=lambda: None))  # type: ignore[arg-type]
    for step, each in enumerate(tokens, start=1):
        reporting.end_step(StepDone(step, Losses.of(values_of(slots, each)), 0.0, 0.0, 0.0))
    last = known(tokens[1:])
    expected = known(tokens) | {name: last[name] for name in (LOSS, Z_LOSS)}
    assert {name: shown[0][name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_what_has_no_target_or_is_not_finite_has_no_point_of_the_loss() -> None:
    random, slots = np.random.default_rng(2), slots_of_a_run()
    full = values_of(slots, random_tokens(10, random))
    shown: list[Any] = []
    said: list[str] = []
    given: list[Values] = []  # the batch of the step, and of its validation
    empty = values_of(slots, random_tokens(10, random))
    for name in (LOSS, Z_LOSS, TOKENS):
        empty.sums[slots.sums[name]] = [0.0]  # type: ignore[index]
    wrong = values_of(slots, random_tokens(10, random))
    wrong.sums[slots.sums[LOSS]] = [np.nan]  # type: ignore[index]
    reporter: Any = SimpleNamespace(
        training=lambda step, interval, curves, waterfall: shown.append(curves),
        validation=lambda *told: shown.append(told),
        say=said.append,
    )
    run: Any = SimpleNamespace(
        settings=SimpleNamespace(
            metrics=SimpleNamespace(every=1), train=SimpleNamespace(validate_every=1, steps=9, batch_tokens=1)
        ),
        data=SimpleNamespace(
            flops_of_all=float,
            validation_steps=1,
            validation=lambda: given[-1:],
            bigram_entropy=None,
            position=SimpleNamespace(tokens_seen=int),
        ),
        engine=SimpleNamespace(
            settled_parameters=contextlib.nullcontext,
            forward_backward=lambda batch, forward_only: SimpleNamespace(values=batch),
        ),
        observers=Observers([], print),
        updates=SimpleNamespace(skipped=0),
        groups=SimpleNamespace(launch=SimpleNamespace(rank=0)),
        reporter=reporter,
        is_stopping=False,
    )
    stopping: Any = SimpleNamespace(hear=lambda step: False)
    reporting = Reporting(run, reporter, Meter(), SimpleNamespace(take=lambda: None))  # type: ignore[arg-type]
    for step, (batch, norm) in enumerate([(full, 1.0), (empty, 0.0), (wrong, np.nan)], start=1):
        applied = bool(np.isfinite(norm))
        given.append(batch)
        reporting.end_step(StepDone(step, Losses.of(batch), norm, 0.0, 0.0, applied))
        Validation(run, stopping, Saving(run)).end_step(SimpleNamespace(step=step))  # type: ignore[arg-type]
    first, validation, second, third = shown
    assert {LOSS, Z_LOSS, "grad_norm"} <= first.keys() and validation[1] == full.total(LOSS) / 10
    assert not {LOSS, Z_LOSS} & second.keys() and second["grad_norm"] == 0
    assert not {LOSS, "grad_norm"} & third.keys() and third["train/skipped_steps"] == 0
    assert said == [
        "step 2 | no validation loss: no target of the held-out documents counts",
        "step 3 | validation loss nan, which is no point of its curve",
    ]
