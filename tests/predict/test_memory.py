"""Peak live tensors of a real forward and backward pass, and what the predictor says of them: within 10%."""

from typing import Any

import pytest
from support import parity, steps

from lsys.predict.activations import Activations
from lsys.predict.deployment import Deployment

TOLERANCE = 0.10
GROUPED = {"heads": 6, "key_heads": 3, "key_dim": 20, "head_dim": 28}


def peak(rank: int, world_size: int, *arguments: Any) -> int:
    return steps.peak(rank, world_size, *arguments)


def case(
    ranks: int, pattern: str, micro_batches: int = 1, tokens: int = 1024, **more: Any
) -> tuple[int, dict[str, Any]]:
    changes = dict(
        model__pattern=pattern, model__layers=4, model__hidden=128, model__heads=4, model__head_dim=32, model__groups=2,
        model__ffn=320, model__vocab=500, train__micro_batch_tokens=tokens, train__batch_tokens=micro_batches * tokens,
    )  # fmt: skip
    return ranks, {**changes, **more}


Changes = dict[str, Any]
FULL: Changes = {"train__recompute": "full"}
SELECTIVE: Changes = {"train__recompute": "selective"}
ULYSSES: Changes = {"parallel__attention": "ulysses", "parallel__linear": "ulysses"}
BF16: Changes = {"train__precision": "bf16"}
CP2: Changes = {"parallel__context": 2}
PP2: Changes = {"parallel__pipeline": 2}
VPP2: Changes = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
CASES = {
    "S": case(1, "S"),
    "LLLS full": case(1, "LLLS", **FULL),
    "MD bf16": case(1, "MD", model__linear=GROUPED, **BF16),
    "GD selective": case(1, "GD", **SELECTIVE),
    "GS full": case(1, "GS", **FULL),
    "K full": case(1, "K", **FULL),
    "RW ulysses selective": case(2, "RW", model__window=64, **ULYSSES, **CP2, **SELECTIVE),
    "TP2": case(2, "LS", parallel__tensor=2),
    "PP2": case(2, "LS", 4, **PP2),
    "VPP2 selective bf16": case(2, "LS", 4, **VPP2, **SELECTIVE, **BF16),
    "CP2 states": case(2, "LGMD", **CP2),
}
MORE = {
    "R groups": case(1, "R", model__linear=GROUPED),
    "G groups": case(1, "G", model__linear=GROUPED),
    "L bf16": case(1, "L", **BF16),
    "W long vocabulary": case(1, "W", model__window=64, model__vocab=8000),
    "long bf16 vocabulary": case(1, "L", model__vocab=8000, train__z_loss=0.0, **BF16),
    "wide MLP": case(1, "MS", model__ffn=1024, **FULL),
    "TP2 full": case(2, "LS", parallel__tensor=2, **FULL),
    "TP2 bf16": case(2, "GD", parallel__tensor=2, **BF16),
    "VPP2": case(2, "LS", 4, **VPP2),
    "PP4": case(4, "LS", 8, parallel__pipeline=4),
    "PP4 two micro-batches": case(4, "LS", 2, parallel__pipeline=4),
    "PP4xVPP2": case(4, "LS", 8, parallel__pipeline=4, parallel__virtual_pipeline=2, model__layers=8),
    "CP2 ring": case(2, "S", parallel__attention="ring", **CP2),
    "CP2 gather full": case(2, "S", parallel__attention="gather", **CP2, **FULL),
    "CP2 ulysses": case(2, "LS", **ULYSSES, **CP2),
    "CP2 usp": case(2, "LS", parallel__attention="usp", **CP2),
    "G": case(1, "G"),
    "G groups full": case(1, "G", model__linear=GROUPED, **FULL),
    "G bf16 selective": case(1, "G", **BF16, **SELECTIVE),
    "GS selective": case(1, "GS", 4, **SELECTIVE),
    "GS wide heads full": case(1, "GS", model__head_dim=64, **FULL),
    "K groups bf16": case(1, "K", model__linear=GROUPED, **BF16),
    "KS selective": case(1, "KS", 2, **SELECTIVE),
    "K CP2 full": case(2, "K", **CP2, **FULL),
    "GS TP2 full": case(2, "GS", parallel__tensor=2, model__tied=False, **FULL),
    "GS ulysses full": case(2, "GS", **ULYSSES, **CP2, **FULL),
    "GS ulysses selective": case(2, "GS", **ULYSSES, **CP2, **SELECTIVE),
    "G lasp2 full": case(2, "G", **CP2, **FULL),
    "RW full": case(1, "RW", model__window=64, **FULL),
    "RW selective": case(1, "RW", 2, model__window=64, **SELECTIVE),
    "MD ulysses full": case(2, "MD", **ULYSSES, **CP2, **FULL),
    "CP2 lasp1 selective": case(2, "GM", parallel__linear="lasp1", **CP2, **SELECTIVE),
    "CP2 zeco full": case(2, "D", parallel__linear="zeco", **CP2, **FULL),
    "CP4 contiguous bf16": case(4, "LS", parallel__context=4, parallel__layout="contiguous", **BF16),
    "TP2xCP2": case(4, "DS", parallel__tensor=2, **CP2),
    "TP2xPP2 full": case(4, "LS", 4, parallel__tensor=2, **PP2, **FULL),
}


def check(gloo: Any, ranks: int, changes: dict[str, Any]) -> None:
    config = parity.settings(**changes)
    deployment = Deployment(config, ranks, gpu=False)
    activations = Activations(deployment)
    for rank, found in enumerate(gloo(ranks, peak, changes, (config.train.micro_batch_tokens,))):
        told = activations.peak(deployment.mesh.coordinate(rank, "pipeline")).total
        assert told == pytest.approx(found, rel=TOLERANCE), (rank, told / found - 1)


@pytest.mark.parametrize("name", CASES)
def test_peak_of_live_tensors(gloo: Any, name: str) -> None:
    check(gloo, *CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_peak_of_live_tensors_more(gloo: Any, name: str) -> None:
    check(gloo, *MORE[name])
