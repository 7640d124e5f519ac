"""Bytes that the predictor says are those of real engine steps, exactly: on the links, and in the engine's tensors."""

from typing import Any

import pytest
from support import parity, steps

from lsys.predict.deployment import Deployment
from lsys.predict.traffic import StepTraffic
from lsys.predict.weights import weights

LINEAR = {"heads": 4, "key_heads": 2, "key_dim": 6}


def axes(tensor: int = 1, pipeline: int = 1, virtual: int = 1, context: int = 1, **more: Any) -> dict[str, Any]:
    degrees = dict(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context)
    return {f"parallel__{name}": degree for name, degree in degrees.items()} | more


CASES = {
    "one rank": (1, {}),
    "TP2 z-loss off": (2, axes(tensor=2, train__z_loss=0.0)),
    "PP2xVPP2 full": (2, axes(pipeline=2, virtual=2, train__recompute="full")),
    "CP2 bf16": (2, axes(context=2, train__precision="bf16")),
    "DP2 plain": (2, {"optimizer__distributed": False}),
    "DP2 overlap": (2, {"train__overlap": True}),
    "RGMD CP2 selective": (
        2, axes(context=2, model__pattern="RGMD", model__linear=LINEAR, train__recompute="selective")
    ),
    "GW TP2xCP2": (4, axes(tensor=2, context=2, model__pattern="GW", model__window=9)),
}  # fmt: skip
MORE = {
    "PP2 untied bf16": (2, axes(pipeline=2, model__tied=False, train__precision="bf16")),
    "PP2xDP2 tied overlap": (4, axes(pipeline=2, train__overlap=True)),
    "PP2xCP2 plain bf16": (4, axes(pipeline=2, context=2, optimizer__distributed=False, train__precision="bf16")),
    "TP2xPP2 full G": (4, axes(tensor=2, pipeline=2, train__recompute="full", model__pattern="GS")),
    "PP4 eight layers": (4, axes(pipeline=4, model__layers=8)),
    "PP2xVPP4": (2, axes(pipeline=2, virtual=4, model__layers=8)),
    "PP4xVPP2": (4, axes(pipeline=4, virtual=2, model__layers=8)),
    "CP4 zeco lrpe first": (4, axes(context=4, parallel__linear="zeco", model__linear={"lrpe": "first"})),
    "CP3 lasp1 no decay": (3, axes(context=3, parallel__linear="lasp1", model__linear={"decay": False})),
    "CP4 ulysses": (
        4, axes(context=4, parallel__linear="ulysses", parallel__attention="ulysses", model__pattern="GSMD",
                model__linear=LINEAR)
    ),
    "CP4 usp nodes": (4, axes(context=4, parallel__attention="usp", model__pattern="S", train__recompute="selective")),
    "CP4 gather contiguous": (
        4, axes(context=4, parallel__attention="gather", parallel__layout="contiguous", model__pattern="WS",
                model__window=50)
    ),
    "CP2xDP2 ring nodes": (4, axes(context=2, parallel__attention="ring", optimizer__clip=0.0)),
}  # fmt: skip


def operations(rank: int, world_size: int, *arguments: Any) -> dict[str, Any]:
    return steps.operations(rank, world_size, *arguments)


def check(gloo: Any, ranks: int, changes: dict[str, Any], ranks_per_node: int = 8) -> None:
    config = parity.settings(**changes)
    for rank, found in enumerate(gloo(ranks, operations, changes, 2, ranks_per_node)):
        expected = {key: size for key, size in found["bytes"].items() if size}
        told: dict[Any, int] = {}
        for lengths in found["lengths"]:  # of each micro-batch
            deployment = Deployment(config, ranks, ranks_per_node, gpu=False, lengths=lengths)
            moved = StepTraffic(deployment).bytes(rank)
            for key, size in moved.items():
                if key[0] == "context":  # depends on the documents; as if all micro-batches were this one
                    told[key] = told.get(key, 0) + size // deployment.micro_batches
                elif key[0] != "world":  # asked by the loop, not the engine
                    told[key] = size
        assert {key: size for key, size in told.items() if size} == expected, rank
        stage, place = deployment.mesh.coordinate(rank, "pipeline"), deployment.mesh.coordinates(rank)
        held = weights(deployment, stage, place["data"] * deployment.mesh.context + place["context"])
        assert found["tensors"] == {
            "parameters": held.parameters, "gradients": held.gradients, "optimizer": held.optimizer,
        }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_exact(gloo: Any, case: str) -> None:
    check(gloo, *CASES[case], 2 if "TP2xCP2" in case else 8)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_bytes_are_exact_more(gloo: Any, case: str) -> None:
    check(gloo, *MORE[case], 2 if "nodes" in case else 8)
