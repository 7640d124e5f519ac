"""Losses that layers add: gradients and means are those of the written-down total on one device, whatever the degrees, once each."""

from typing import Any
from unittest import mock

import pytest
import torch
from support import added, parity, steps
from support.comparing import largest

from lsys.config import losses
from lsys.config.losses import LayerLoss, layer_losses
from lsys.config.messages import ConfigError
from lsys.config.reports import declared
from lsys.predict.deployment import Deployment
from lsys.predict.traffic import StepTraffic

TOLERANCE = 1e-5  # fp32, relative
RECOMPUTE = ("none", "selective", "full")
FAST: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, dict(tensor=2)),
    "PP2xVPP2": (2, dict(pipeline=2, virtual_pipeline=2)),
    "CP2": (2, dict(context=2)),
    "DP2": (2, {}),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2xCP2": (4, dict(tensor=2, context=2)),
    "TP2xPP2": (4, dict(tensor=2, pipeline=2)),
    "CP3 contiguous": (3, dict(context=3, layout="contiguous")),
}


def trained(rank: int, world_size: int, *arguments: Any) -> Any:
    return added.trained(rank, world_size, *arguments)


def defined(rank: int, world_size: int) -> Any:
    return added.defined(rank, world_size)


_definition: list[Any] = []


def differences(gloo: Any, ranks: int, degrees: dict[str, Any], recompute: str, fault: str = "") -> dict[str, float]:
    """Largest relative differences from the definition."""
    if not _definition:
        _definition.extend(gloo(1, defined))
    changes = {f"parallel__{name}": degree for name, degree in degrees.items()} | {"train__recompute": recompute}
    many = gloo(ranks, trained, changes, fault)
    whole, copies = parity.merge([parity.Outcome(pieces=each["pieces"]) for each in many])
    exact, _ = parity.merge([parity.Outcome(pieces=each["pieces"]) for each in _definition])
    assert whole.keys() == exact.keys()
    found = {
        "gradients": largest(float((whole[key] - g).norm() / g.norm()) for key, g in exact.items()),
        "copies": copies,
    }
    for name in added.WEIGHTS:
        known = _definition[0]["reported"][0][name]
        found[name] = largest(abs(now[name] / known - 1) for each in many for now in each["reported"])
    known = _definition[0]["losses"][0]  # the cross-entropy alone, in training and validation
    found["loss"] = largest(abs(loss / known - 1) for each in many for loss in each["losses"])
    return found


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", FAST)
def test_what_layers_add_is_the_total_on_one_device(gloo: Any, case: str, recompute: str) -> None:
    found = differences(gloo, *FAST[case], recompute)
    assert largest(found.values()) < TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("case", SLOW)
def test_what_layers_add_is_the_total_on_one_device_more(gloo: Any, case: str, recompute: str) -> None:
    found = differences(gloo, *SLOW[case], recompute)
    assert largest(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    "fault, case, recompute, seen",
    [
        ("recomputed and reported again", "one rank", "selective", added.HEADS),
        ("recomputed and not differentiated", "one rank", "full", "gradients"),
        ("counted by rank", "DP2", "none", "gradients"),
        ("divided by the targets, whatever it counts", "one rank", "none", "gradients"),
        ("no weight", "one rank", "none", "gradients"),
    ],
)
def test_planted_faults_are_noticed(gloo: Any, fault: str, case: str, recompute: str, seen: str) -> None:
    assert differences(gloo, *FAST[case], recompute, fault)[seen] > 1e-3


def operations(rank: int, world_size: int, changes: dict[str, Any]) -> Any:
    with added.adding(added.by_the_engine):
        return steps.operations(rank, world_size, changes)


@pytest.mark.parametrize("case", ["TP2", "PP2xVPP2", "DP2"])
def test_their_messages_are_predicted(gloo: Any, case: str) -> None:
    ranks, degrees = FAST[case]
    changes = {f"parallel__{name}": degree for name, degree in degrees.items()}
    config = parity.settings(**changes)
    for rank, found in enumerate(gloo(ranks, operations, changes)):
        deployment = Deployment(config, ranks, gpu=False)
        with mock.patch.object(losses, "SOURCES", [*losses.SOURCES, added.declare]):
            told = StepTraffic(deployment)
            moved = {key: size for key, size in told.bytes(rank).items() if key[0] not in ("context", "world")}
            assert [each.operation.bytes for each in told.once(rank)].count(8 * 4) == 1  # what is counted
        assert moved == {key: size for key, size in found["bytes"].items() if size and key[0] != "context"}


def refusals(rank: int, world_size: int) -> list[str]:
    def undeclared(packed: Any, name: str, total: Any, through: Any) -> Any:
        return packed.add_loss("probe/nothing", total, through)

    def vector(packed: Any, name: str, total: Any, through: Any) -> Any:
        return packed.add_loss(name, total.expand(2), through)

    def dropped(packed: Any, name: str, total: Any, through: Any) -> Any:
        packed.add_loss(name, total, through)
        return through

    said = []
    for add in (undeclared, vector, dropped):
        with added.engine_and_plan(rank, world_size, {}, add) as (engine, plan):
            try:
                engine.forward_backward(plan.on_rank(0, engine.groups.device, engine.groups.context))
            except ValueError as error:
                said.append(str(error))
    return said


def test_mistakes_are_told(gloo: Any) -> None:
    said = gloo(1, refusals)[0]
    for text, part in zip(
        said, ["is added to the loss but not declared", "one number, fp32", "never diff"], strict=True
    ):
        assert part in text


def test_a_name_has_one_declaration() -> None:
    twice = [lambda _: [LayerLoss("a", 1.0)], lambda _: [LayerLoss("a", 2.0)]]
    with (
        mock.patch.object(losses, "SOURCES", twice),
        pytest.raises(ConfigError, match="has the weight 2.0, and 1.0 in"),
    ):
        declared(parity.settings())
    same = [lambda _: [LayerLoss("a", 1.0)], lambda _: [LayerLoss("b", 2.0), LayerLoss("a", 1.0)]]
    with mock.patch.object(losses, "SOURCES", same):
        assert [loss.name for loss in layer_losses(parity.settings())] == ["a", "b"]


def test_cards_declare_them() -> None:
    from lsys.mixers.dense import Dense
    from lsys.mixers.lightning import Lightning

    config = parity.settings()
    assert layer_losses(config) == ()
    found = [LayerLoss("a", 1.0), LayerLoss("b", 2.0)]
    with (
        mock.patch.object(Lightning, "losses", lambda self: found[:1]),
        mock.patch.object(Dense, "losses", lambda self: found[1:]),
    ):
        assert layer_losses(config) == (*found,)
        assert [metric.name for metric in declared(config)][-2:] == ["a", "b"]


def two_ranks(rank: int, world_size: int) -> list[torch.Tensor]:
    """The gradient of a toy model in fp64 over two data ranks and two micro-batches, summed and divided as the engine does it."""
    import torch.distributed as dist

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.config.reports import Metric, Slots
    from lsys.config.schema import Parallel
    from lsys.observe.added_loss import scales
    from lsys.observe.values import Collector
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    with process_groups(Parallel(), Launch(rank=rank, world_size=world_size)) as groups:
        weights, batches = toy()
        mine = batches[rank::world_size]
        found = scales([LayerLoss("square", 0.7)], mine, groups.collection.dp_cp, groups.device)
        collector = Collector(Slots([Metric("square", "sum", axes=("data", "context", "tensor"))]), groups, found)
        for batch in mine:
            with collector.forward() as values:
                hidden = batch.x @ weights
                hidden = values.add_loss("square", hidden.square().sum(), hidden)
                (hidden.tanh().sum(1) * batch.loss_mask).sum().backward()
        assert weights.grad is not None
        gradient, targets = weights.grad, sum(batch.loss_mask.sum() for batch in mine)
        for each in (gradient, targets):
            dist.all_reduce(each)
        return [gradient / targets, torch.tensor(collector.reduce().curves["square"], dtype=torch.float64)]


def toy() -> tuple[torch.Tensor, list[Any]]:
    from types import SimpleNamespace

    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    batches = []
    for count in (5, 1, 0, 7):
        x, mask = (
            torch.randn(count, 3, generator=generator, dtype=torch.float64),
            torch.rand(count, generator=generator),
        )
        packed = SimpleNamespace(positions=torch.arange(count))
        batches.append(SimpleNamespace(x=x, loss_mask=(mask > 0.5).double(), packed=packed))
    return weights, batches


def test_in_fp64_it_is_exact(gloo: Any) -> None:
    weights, batches = toy()
    x, mask = torch.cat([batch.x for batch in batches]), torch.cat([batch.loss_mask for batch in batches])
    hidden = x @ weights
    square = hidden.square().sum() / len(x)
    ((hidden.tanh().sum(1) * mask).sum() / mask.sum() + 0.7 * square).backward()
    for gradient, mean in gloo(2, two_ranks):
        torch.testing.assert_close(gradient, weights.grad, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mean, square.detach(), rtol=1e-12, atol=0)
