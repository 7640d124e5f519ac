"""Final losses: the one without all logits trains as the one with them, at any degrees; its bytes and messages are predicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from support import parity, steps
from support.comparing import largest

from lsys.config.losses import LOSSES
from lsys.predict.activations import Activations
from lsys.predict.deployment import Deployment
from lsys.predict.traffic import StepTraffic

TOLERANCE = 1e-5  # fp32, relative
CHUNKED: dict[str, Any] = {"train__loss": "chunked_cross_entropy"}
DEGREES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"parallel__tensor": 2}),
    "PP2 untied": (2, {"parallel__pipeline": 2, "model__tied": False}),
    "CP2": (2, {"parallel__context": 2}),
    "TP2xPP2xVPP2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
}


@contextmanager
def in_pieces() -> Iterator[None]:
    """Inside, chunks are of 16 tokens; and who asks for all logits gets none."""
    from lsys.model import chunked_loss
    from lsys.model.loss import Output

    def refuse(output: Any) -> Any:
        raise AssertionError("all logits were made")

    with mock.patch.object(chunked_loss, "CHUNK", 16), mock.patch.object(Output, "logits", refuse):
        yield


def outcome(rank: int, world_size: int, changes: dict[str, Any]) -> Any:
    if "train__loss" not in changes:
        return parity.train(rank, world_size, changes).__dict__
    from lsys.runtime import install_megatron

    install_megatron()
    with in_pieces():
        return parity.train(rank, world_size, changes).__dict__


@pytest.mark.parametrize("case", [*list(DEGREES)[:4], pytest.param("TP2xPP2xVPP2", marks=pytest.mark.slow)])
def test_it_trains_as_the_one_with_all_logits(gloo: Any, case: str) -> None:
    ranks, changes = DEGREES[case]
    shared = {key: value for key, value in changes.items() if not key.startswith("parallel__")}
    one = [parity.Outcome(**each) for each in gloo(1, outcome, shared)]
    many = [parity.Outcome(**each) for each in gloo(ranks, outcome, changes | CHUNKED)]
    found = parity.difference(one, many)
    assert largest(found.values()) < TOLERANCE, found


def operations(rank: int, world_size: int, changes: dict[str, Any]) -> Any:
    return steps.operations(rank, world_size, changes)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["TP2", pytest.param("TP2xPP2xVPP2", marks=pytest.mark.slow)])
def test_messages_of_each_are_predicted(gloo: Any, case: str, loss: str) -> None:
    ranks, changes = DEGREES[case]
    changes = changes | {"train__loss": loss}
    config = parity.settings(**changes)
    for rank, found in enumerate(gloo(ranks, operations, changes)):
        told = StepTraffic(Deployment(config, ranks, gpu=False, lengths=found["lengths"][0])).bytes(rank)
        expected = {key: size for key, size in found["bytes"].items() if size and key[0] != "context"}
        assert {key: size for key, size in told.items() if key[0] not in ("context", "world")} == expected


def peak(rank: int, world_size: int, changes: dict[str, Any], lengths: tuple[int, ...]) -> int:
    return steps.peak(rank, world_size, changes, lengths)


@pytest.mark.parametrize(
    "ranks, more",
    [
        (1, {"train__z_loss": 0.0}),
        (1, {"train__precision": "bf16"}),
        pytest.param(2, {"parallel__tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_memory_of_each_is_predicted(gloo: Any, ranks: int, more: dict[str, Any]) -> None:
    """Of a large vocabulary and four chunks: within 10%; and without all logits it is less."""
    changes = dict(
        model__pattern="L", model__layers=2, model__hidden=64, model__heads=4, model__head_dim=16, model__groups=2,
        model__ffn=96, model__vocab=8000, train__micro_batch_tokens=4096, train__batch_tokens=4096, **more,
    )  # fmt: skip
    seen = {}
    for name in LOSSES:
        loss = {"train__loss": name}
        config = parity.settings(**changes | loss)
        found = gloo(ranks, peak, changes | loss, (4096,))
        told = Activations(Deployment(config, ranks, gpu=False)).peak(0).total
        assert told == pytest.approx(found[0], rel=0.1), (name, told / found[0] - 1)
        seen[name] = found[0]
    assert seen["chunked_cross_entropy"] < 0.75 * seen["cross_entropy"]


def test_unknown_losses_are_refused() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError, match="cross_entropy"):
        parity.settings(train__loss="hinge")


class Own:
    """A loss that is in no table: twice the cross-entropy, its second half under a name that layers have declared, before the first."""

    def __init__(self, settings: Any) -> None:
        from lsys.model.loss import CrossEntropy

        self.half = CrossEntropy(settings)

    def __call__(self, output: Any) -> dict[str, Any]:
        from lsys.config.reports import LOSS, Z_LOSS

        found = self.half(output)
        return {Z_LOSS: found[Z_LOSS] + found[LOSS], LOSS: found[LOSS]}


def own_loss(rank: int, world_size: int, changes: dict[str, Any]) -> Any:
    from lsys.config.schema import Train

    original = parity.settings

    def settings(**changes: Any) -> Any:
        config = original(**changes)
        train = Train.model_construct(**config.train.model_dump() | {"loss": f"{__name__}:Own"})
        return config.model_copy(update={"train": train})

    with mock.patch.object(parity, "settings", settings):
        return parity.train(rank, world_size, changes).__dict__


def test_any_class_can_be_one(gloo: Any) -> None:
    """Norms, which are before clipping, are those of the total, twice the cross-entropy's: all parts are differentiated, whatever their order."""
    changes = {"train__z_loss": 0.0, "parallel__pipeline": 2}
    plain = parity.Outcome(**gloo(2, outcome, changes)[0])
    twice = parity.Outcome(**gloo(2, own_loss, changes)[0])
    assert twice.losses[0] == plain.losses[0] and twice.norms[0] == pytest.approx(2 * plain.norms[0], rel=1e-6)
