"""Values that layers report, known by hand, arrive right from any stage, chunk and rank, once each, whatever is recomputed."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support import parity, reporting, steps

from lsys.config import reports
from lsys.config.reports import Metric, Slots, declared
from lsys.predict.deployment import Deployment
from lsys.predict.traffic import StepTraffic

RECOMPUTE = ("none", "selective", "full")
FAST: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, dict(tensor=2)),
    "PP2xVPP2": (2, dict(pipeline=2, virtual_pipeline=2)),
    "CP2": (2, dict(context=2)),
    "DP2": (2, {}),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "PP4": (4, dict(pipeline=4)),
    "TP2xCP2": (4, dict(tensor=2, context=2)),
    "TP2xPP2": (4, dict(tensor=2, pipeline=2)),
    "PP2xVPP2xDP2": (4, dict(pipeline=2, virtual_pipeline=2)),
    "CP3 contiguous": (3, dict(context=3, layout="contiguous")),
}


def curves(rank: int, world_size: int, *arguments: Any) -> Any:
    return reporting.curves(rank, world_size, *arguments)


def keys(degrees: dict[str, Any], recompute: str) -> dict[str, Any]:
    return {f"parallel__{name}": degree for name, degree in degrees.items()} | {"train__recompute": recompute}


def faults_of(found: list[dict[str, float]], ranks: int, degrees: dict[str, Any]) -> list[str]:
    """The tags whose values are not those known by hand."""
    tensor, context = degrees.get("tensor", 1), degrees.get("context", 1)
    replicas = ranks // (tensor * context * degrees.get("pipeline", 1))
    wrong = []
    for told, these in zip(found, ([0, 1], [2], [2]), strict=True):
        known = reporting.expected(these, tensor, replicas)
        probes = {tag: value for tag, value in told.items() if tag.startswith("probe/")}
        assert probes.keys() == known.keys()  # so what was never reported is no curve
        wrong += [tag for tag, value in known.items() if told[tag] != pytest.approx(value, rel=1e-12)]
    return sorted(set(wrong))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", FAST)
def test_reported_values_are_those_known_by_hand(gloo: Any, case: str, recompute: str) -> None:
    ranks, degrees = FAST[case]
    everywhere = gloo(ranks, curves, keys(degrees, recompute))
    assert all(found == everywhere[0] for found in everywhere)
    assert faults_of(everywhere[0], ranks, degrees) == []


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", SLOW)
def test_reported_values_are_those_known_by_hand_more(gloo: Any, case: str, recompute: str) -> None:
    ranks, degrees = SLOW[case]
    assert faults_of(gloo(ranks, curves, keys(degrees, recompute))[-1], ranks, degrees) == []


@pytest.mark.parametrize(
    "fault, case, recompute, seen",
    [
        ("what is recomputed counts twice", "one rank", "selective", "probe/tokens"),
        ("what is recomputed counts twice", "CP2", "full", "probe/residues/0"),
        ("other stages are forgotten", "PP2xVPP2", "none", "probe/residues/0"),
        ("other tensor ranks are forgotten", "TP2", "none", "probe/width"),
        ("copies count", "CP2", "none", "probe/width"),
    ],
)
def test_planted_faults_are_noticed(gloo: Any, fault: str, case: str, recompute: str, seen: str) -> None:
    ranks, degrees = FAST[case]
    found = [
        [{tag: told.get(tag, float("nan")) for tag in reporting.expected([0], 1, 1)} for told in rank]
        for rank in gloo(ranks, curves, keys(degrees, recompute), fault)
    ]
    assert seen in faults_of(found[0], ranks, degrees)


def operations(rank: int, world_size: int, changes: dict[str, Any]) -> Any:
    with reporting.reporting():
        return steps.operations(rank, world_size, changes)["counts"]


@pytest.mark.parametrize("case", [*FAST, pytest.param("TP2xPP2", marks=pytest.mark.slow)])
def test_their_messages_are_predicted(gloo: Any, case: str) -> None:
    """What a step sends for them, beside what it sends without: each operation, to the byte."""
    ranks, degrees = (FAST | SLOW)[case]
    changes = keys(degrees, "none")
    sums, maxima = 8 * (3 + 1 + 2 + 1 + 3 + 1 + 2), 8 * (1 + 2 + 1)
    for rank, counts in enumerate(gloo(ranks, operations, changes)):
        deployment = Deployment(parity.settings(**changes), ranks, ranks, gpu=False)
        plain = list(StepTraffic(deployment).once(rank))
        with mock.patch.object(reports, "SOURCES", [*reports.SOURCES, reporting.metrics]):
            told = list(StepTraffic(deployment).once(rank))
        stages = degrees.get("pipeline", 1)
        sizes = [
            ("data", len(deployment.group("replicas", rank))),
            ("pipeline", stages),
            ("tensor", degrees.get("tensor", 1)),
        ]
        new = [each for each in told if each not in plain]
        assert sorted((each.axis, len(each.ranks), each.operation.bytes) for each in new) == sorted(
            (axis, count, size) for axis, count in sizes for size in (sums, maxima)
        )
        for each in new:
            assert counts[each.axis, each.operation.kind, each.operation.bytes, len(each.ranks)] == 1
        assert not any(operation[1:3] == ("broadcast", 24) for operation in counts)
        assert sum(each.operation.bytes == 24 for each in plain) == 2  # over data and stages


def test_what_is_declared_is_checked() -> None:
    config = parity.settings()
    names = [metric.name for metric in declared(config)]
    assert names == ["loss_metrics/global_avg_loss", "loss_metrics/z_loss", "tokens"]
    assert [message.bytes for message in Slots(declared(config)).messages] == [24]
    with pytest.raises(ValueError, match="axes among tensor"):
        Metric("a", "sum", axes=("expert",))
    with pytest.raises(ValueError, match="only a mean"):
        Metric("a", "sum", weight="tokens")
    cases: list[tuple[list[Metric], str]] = [
        ([Metric("a", "sum"), Metric("a", "max")], "a is declared twice"),
        ([Metric("a", "sum", size=2), Metric("a/1", "sum")], "a/1 is declared twice"),
        ([Metric("lr", "sum")], "lr is declared, and is a curve that every run has"),
        ([Metric("comm/x", "sum")], "comm/x is declared, and"),
        ([Metric("a", "mean", weight="b")], "b is no sum"),
        ([Metric("a", "mean", weight="tokens", axes=("tensor",))], "tokens is no sum"),
    ]
    for wrong, said in cases:
        with mock.patch.object(reports, "SOURCES", [*reports.SOURCES, partial(lambda wrong, _: wrong, wrong)]):
            with pytest.raises(ValueError, match=said):
                declared(config)


def refusals(rank: int, world_size: int) -> list[str]:
    import torch

    from lsys.observe.values import Collector
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    config, said = parity.settings(parallel__pipeline=2), []
    with process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        collector = Collector(Slots([*declared(config), *reporting.metrics(config)]), groups)
        cases: list[tuple[Any, ...]] = [
            ("probe/nothing", 1.0),
            ("probe/residues", torch.zeros(2)),
            ("probe/position", 1.0),
            ("probe/square", 1.0, 1.0),
            ("tokens", 1.0),
        ]
        for wrong in cases:
            try:
                collector.add(*wrong)
            except ValueError as error:
                said.append(str(error))
    return said


def test_what_was_not_declared_so_is_refused_where_it_is_reported(gloo: Any) -> None:
    first, last = gloo(2, refusals)
    for said, part in zip(
        first,
        [
            "nothing is reported but not declared",
            "with 3 numbers, and 2",
            "a weight is to",
            "takes no weight",
            "last stage's",
        ],
        strict=True,
    ):
        assert part in said
    assert len(last) == 4


def run(rank: int, world_size: int, *arguments: Any) -> str:
    return reporting.run(rank, world_size, *arguments)


@pytest.mark.parametrize("case", ["one rank", "PP2xVPP2"])
def test_a_run_shows_them_over_intervals_and_validation_apart(gloo: Any, tmp_path: Path, case: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ranks, degrees = FAST[case]
    said = gloo(ranks, run, str(tmp_path), keys(degrees, "full"), 2)[0]
    assert said.count("| probed 388") == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    names = {metric.name for metric in declared(parity.settings())}
    assert {tag for tag in found if not reports.is_own(tag)} - names == {t for t in found if t.startswith("probe/")}
    for above, points in (("", {2: [0, 1], 4: [2, 3]}), ("validation/", {2: [4], 4: [4]})):
        known = {step: reporting.expected(these, 1, 1) for step, these in points.items()}
        for tag in known[2]:
            assert found[above + tag] == pytest.approx({step: row[tag] for step, row in known.items()}, rel=1e-6), tag
    assert "probe/never" not in found and "tokens" not in found and "loss_metrics/z_loss" in found
