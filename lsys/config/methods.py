"""Which way softmax and window layers cross the context ranks: as configured, or the cheapest by the cost table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lsys.config.schema import Config
from lsys.mixers.exchange import KeyValues
from lsys.parallel.messages import Placement
from lsys.parallel.messages.attention import Shape
from lsys.parallel.messages.choice import Estimate, choose
from lsys.parallel.methods import SOFTMAX

ITEMSIZE = {"fp32": 4, "bf16": 2}


def attention_costs(config: Config, node_of_rank: Sequence[int]) -> dict[str, tuple[Estimate, ...]]:
    """What each method costs one layer, by the kinds of layers whose keys and values cross ranks.

    For the pack that costs most: one document as long as a micro-batch.

    Args:
        node_of_rank: node of each context rank.
    """
    return {
        kind: _choose(
            config.parallel.layout, config.train.micro_batch_tokens, one, itemsize(config), tuple(node_of_rank)
        )
        for kind, card in config.model.cards.items()
        for one in card.exchanges(config.parallel.tensor)
        if isinstance(one, KeyValues)
    }


def itemsize(config: Config) -> int:
    """Bytes of an element of the model."""
    return ITEMSIZE[config.train.precision]


@lru_cache(maxsize=256)
def _choose(layout: str, tokens: int, one: KeyValues, size: int, nodes: tuple[int, ...]) -> tuple[Estimate, ...]:
    shape = Shape(one.heads, one.kv_heads, one.width, size)
    return choose(Placement.of(layout, [tokens], len(nodes)), shape, nodes, mask=one.mask)


def attention_methods(config: Config, node_of_rank: Sequence[int]) -> dict[str, str]:
    """The method of each kind of layer; the same on all ranks that share a sequence."""
    kinds = (kind for kind, card in config.model.cards.items() if not card.has_state)
    if config.parallel.attention != "auto":
        return dict.fromkeys(kinds, config.parallel.attention)
    costs = attention_costs(config, node_of_rank)
    chosen = {kind: next(row.method for row in rows if row.chosen) for kind, rows in costs.items()}
    return dict.fromkeys(kinds, next(iter(SOFTMAX))) | chosen  # to layers that exchange neither, all are the same
