"""Work and times of layers across ranks: against pairs counted token by token, operations one by one, and what is the same by another name."""

from dataclasses import replace
from functools import reduce
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from lsys.config.load import load
from lsys.config.schema import Config
from lsys.mixers.card import Layer
from lsys.mixers.exchange import Exchange, Halo, KeyValues
from lsys.mixers.softmax import Softmax
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.methods import SOFTMAX
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan
from lsys.predict.seconds import StepTime
from lsys.predict.work import StageWork

H100 = hardware("h100x8", "bf16")
CHUNKED = replace(H100, gpu=False)  # kernels of torch operations


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
        is_sent = deployment.place(Layer(kind, "dense")).is_sent
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


def exchanging(*exchanges: Exchange) -> Any:
    """Inside, softmax layers exchange these."""
    return patch.object(Softmax, "exchanges", lambda self, tensor, is_first=False: exchanges)


@pytest.mark.parametrize("method", SOFTMAX)
def test_each_exchange_of_a_mixer_is_waited_for_as_its_kind_is(method: str) -> None:
    """Cards may have none, or several, in any order; halos are waited for, of keys and values only the heads that are sent."""
    settings = config(model__pattern="S", parallel__context=8, parallel__attention=method)
    halo, keys = Halo(3, 2048), KeyValues(16, 4, 128)

    def times(*exchanges: Exchange) -> np.ndarray:  # [waits, beside][forward, backward]
        with exchanging(*exchanges):
            return np.array(StepTime(Deployment(settings, 16, ranks_per_node=4), H100).mixer_exchange("softmax", False))

    of_halo, of_keys = times(halo), times(keys)
    assert (of_halo[0] > 0).all() and (of_halo[1] == 0).all()
    assert ((of_keys[0] > 0) == (method in ("ulysses", "usp"))).all() and (
        (of_keys[1] > 0) == (method != "ulysses")
    ).all()
    assert (times() == 0).all()
    for several in ((halo, keys), (keys, halo), (keys, keys), (halo, halo)):
        assert times(*several) == pytest.approx(sum({halo: of_halo, keys: of_keys}[each] for each in several))


def test_a_mixer_without_exchanges_is_planned() -> None:
    """What it computes is what its card says, in equal parts."""
    with exchanging():
        plan = Plan(config(model__pattern="S", parallel__context=8), 8, H100)
        flops = StageWork(plan.deployment).attention_flops("softmax", plan.deployment.methods["softmax"])
        assert plan.prediction.parts["exposed_context"] == plan.prediction.parts["imbalance"] == 0
    assert sum(flops) == 4 * 2048 * 65536 * 65537 / 2 and len({*flops}) == 1


def test_ring_between_single_ranks_of_usp_is_under_way_beside_its_work() -> None:
    """Seven heads are not sent: what is left is `ring`."""
    settings = (
        config(model__pattern="S", model__heads=7, model__groups=7, parallel__context=8, parallel__attention=method)
        for method in ("usp", "ring")
    )
    usp, ring = (StepTime(Deployment(each, 8), H100).mixer_exchange("softmax", False) for each in settings)
    assert usp == ring and usp[0] == (0, 0) < usp[1]


@pytest.mark.parametrize("context", [1, 8])
def test_of_one_layer_with_phases_first_and_all_are_the_same(context: int) -> None:
    """In memory, time and bytes; and stages without that layer are those of a model without phases."""
    degrees: dict[str, Any] = dict(model__pattern="LS", parallel__context=context, parallel__pipeline=2)
    first, every, none = (
        Plan(config(**degrees, model__layers=4, model__mixers__lightning__lrpe=lrpe), 16, CHUNKED)
        for lrpe in ("first", "all", "none")
    )
    stages = [
        [(plan.memory[stage], StepTime(plan.deployment, CHUNKED).durations(stage)) for plan in (first, every, none)]
        for stage in (0, 1)
    ]
    assert stages[0][0] == stages[0][1] != stages[0][2]
    assert stages[1][0] == stages[1][2] != stages[1][1]
