"""The way each kind of layer crosses the context ranks."""

from typing import Any

import pytest

from lsys.config.methods import attention_costs, attention_methods
from lsys.config.schema import Config

ONE_NODE, TWO_NODES = (0, 0, 0, 0), (0, 0, 1, 1)


def make(**parallel: Any) -> Config:
    return Config.model_validate(
        {
            "model": dict(pattern="SWL", layers=3, hidden=64, heads=8, groups=2, vocab=64, window=64),
            "parallel": dict(context=4) | parallel,
            "data": {"corpora": [{"path": "a"}]},
            "train": dict(folder="out", steps=1, batch_tokens=8192, micro_batch_tokens=8192),
        }
    )


def test_a_configured_method_is_taken_for_all_kinds() -> None:
    assert attention_methods(make(attention="usp"), TWO_NODES) == {"softmax": "usp", "window": "usp"}


@pytest.mark.parametrize("nodes", [ONE_NODE, TWO_NODES])
def test_auto_takes_the_cheapest_for_each_kind(nodes: tuple[int, ...]) -> None:
    config = make()
    costs, taken = attention_costs(config, nodes), attention_methods(config, nodes)
    assert costs.keys() == taken.keys() == {"softmax", "window"}
    for kind, rows in costs.items():
        (chosen,) = (row for row in rows if row.chosen)
        assert chosen.method == taken[kind]
        assert chosen.seconds == min(row.seconds for row in rows if not row.note)
    by_method = {kind: {row.method: row for row in rows} for kind, rows in costs.items()}
    # A window of 64 tokens needs next to nothing of the ranks before it; whole documents are needed by all after them.
    assert by_method["window"]["ring"].most < by_method["softmax"]["ring"].most / 10


def test_tensor_ranks_share_heads() -> None:
    """Half the key heads on each of two tensor ranks: half the bytes of each rank's exchange of keys and values."""
    whole, half = (
        {row.method: row.same_node for row in attention_costs(make(tensor=tensor), ONE_NODE)["softmax"]}
        for tensor in (1, 2)
    )
    assert whole["ring"] == 2 * half["ring"] > 0 and whole["gather"] == 2 * half["gather"] > 0
