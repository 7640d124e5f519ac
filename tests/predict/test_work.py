"""Work and times of layers across ranks: against pairs counted token by token, operations one by one, and what is the same by another name."""

from dataclasses import replace
from functools import reduce
from typing import Any

import pytest

from lsys.config.load import load
from lsys.config.schema import Config
from lsys.parallel.layout import SequenceLayout
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan
from lsys.predict.seconds import StepTime
from lsys.predict.work import StageWork

H100 = hardware("h100x8", "bf16")


def config(**changes: Any) -> Config:
    tree = load("configs/hybrid_1b.yaml").model_dump()
    for key, value in changes.items():
        *sections, name = key.split("__")
        reduce(dict.__getitem__, sections, tree)[name] = value
    return Config.model_validate(tree)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_usp_on_one_node_is_ulysses(layout: str) -> None:
    changes: dict[str, Any] = dict(model__pattern="S", parallel__layout=layout, parallel__context=8)
    plans = [Plan(config(**changes, parallel__attention=method), 8, H100) for method in ("usp", "ulysses")]
    first, second = ((plan.prediction, plan.memory, plan.traffic()) for plan in plans)
    assert first == second


# By method and heads: the groups of ranks 0 and 1 on one node, 2 and 3 on another, and each member's heads.
GROUPS = {
    ("ring", 6): [[(0, 6)], [(1, 6)], [(2, 6)], [(3, 6)]],
    ("ulysses", 6): [[(0, 2), (1, 2), (2, 1), (3, 1)]],
    ("usp", 6): [[(0, 3), (1, 3)], [(2, 3), (3, 3)]],
    ("usp", 3): [[(0, 3)], [(1, 3)], [(2, 3)], [(3, 3)]],  # two ranks cannot share three heads equally
}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("method", "heads"), GROUPS)
def test_attention_is_counted_by_the_pairs_that_a_rank_computes(method: str, heads: int, layout: str) -> None:
    lengths, window, width = (5, 23, 1, 12), 4, 128
    settings = config(
        model__pattern="SW", model__window=window, model__heads=heads, model__groups=heads, parallel__context=4,
        parallel__attention=method, parallel__layout=layout, train__micro_batch_tokens=sum(lengths),
    )  # fmt: skip
    deployment = Deployment(settings, 4, ranks_per_node=2, lengths=lengths)
    work, placed = StageWork(deployment), getattr(SequenceLayout, layout)(lengths, 4)
    for kind, reach in (("softmax", max(lengths)), ("window", window)):
        expected = [0.0] * 4
        for group in GROUPS[method, heads]:
            pairs = 0
            for rank, _ in group:  # of each query, the keys of its document at its place and before it
                pairs += sum(min(place + 1, reach) for place in placed.positions(rank).tolist())
            for rank, mine in group:
                expected[rank] = 4.0 * width * mine * pairs
        assert work.attention_flops(kind, deployment.methods[kind]) == expected
        is_sent = deployment.place(kind).is_sent
        assert is_sent == (len(GROUPS[method, heads][0]) > 1)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("gate_rank", [16, 2048])
def test_exposed_tensor_communication_is_that_of_the_operations_issued(gate_rank: int, recompute: str) -> None:
    """Products that take no time hide nothing; those that take very long hide what comes backward before and behind a projection in."""
    changes: dict[str, Any] = dict(
        model__pattern="KGLS", model__layers=4, parallel__tensor=4, parallel__context=1, train__recompute=recompute,
        model__mixers__kimi_delta__gate_rank=gate_rank, model__mixers__gla__gate_rank=gate_rank,
    )  # fmt: skip
    deployment = Deployment(config(**changes), 8)
    none, long = ({**H100.costs, "matmul": seconds} for seconds in (0.0, 1.0))
    times = [StepTime(deployment, replace(H100, costs=costs)) for costs in (none, long)]
    whole, exposed = (sum(it.tensor_seconds(0, 0)) * deployment.micro_batches for it in times)
    assert whole == pytest.approx(times[0].transfers.operations(times[0].traffic._tensor(0, 0), 0))
    hidden = deployment.micro_batches * sum(
        count * sum(times[0]._gather_scatter(0, width)) for count, width in ((8, 2048), (3, gate_rank))
    )
    assert whole - exposed == pytest.approx(hidden)
