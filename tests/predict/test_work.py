"""Work and times of token mixers across context ranks, against pairs counted token by token and against what is the same by another name."""

from typing import Any

import pytest

from lsys.config.load import load
from lsys.parallel.layout import SequenceLayout
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan
from lsys.predict.search import changed
from lsys.predict.work import StageWork

H100 = hardware("h100x8", "bf16")


def config(**changes: Any) -> Any:
    return changed(load("configs/hybrid_1b.yaml"), {key.replace("__", "."): value for key, value in changes.items()})


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
