"""Which way softmax and window layers cross the context ranks: as configured, or the cheapest by the cost table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from lsys.config.schema import Config
from lsys.parallel.messages import Placement
from lsys.parallel.messages.attention import Estimate, Shape, choose

ITEMSIZE = {"fp32": 4, "bf16": 2}


def attention_costs(config: Config, node_of_rank: Sequence[int]) -> dict[str, tuple[Estimate, ...]]:
    """What each method costs one layer of each kind (`S`, `W`) that the model has.

    For the pack that costs most: one document as long as a micro-batch.

    Args:
        node_of_rank: node of each context rank.
    """
    model, tensor = config.model, config.parallel.tensor
    shape = Shape(model.heads // tensor, model.kv_heads // tensor, model.head_width, ITEMSIZE[config.train.precision])
    windows = {"S": None, "W": model.window}
    return {
        kind: _choose(config.parallel.layout, config.train.micro_batch_tokens, shape, tuple(node_of_rank), window)
        for kind, window in windows.items()
        if kind in model.kinds
    }


@lru_cache(maxsize=256)
def _choose(layout: str, tokens: int, shape: Shape, nodes: tuple[int, ...], window: int | None) -> tuple[Estimate, ...]:
    return choose(Placement.of(layout, [tokens], len(nodes)), shape, nodes, window=window)


def attention_methods(config: Config, node_of_rank: Sequence[int]) -> dict[str, str]:
    """The method of each kind of layer; the same on all ranks that share a sequence."""
    if config.parallel.attention != "auto":
        return dict.fromkeys("SW", config.parallel.attention)
    costs = attention_costs(config, node_of_rank)
    return {kind: next(row.method for row in rows if row.chosen) for kind, rows in costs.items()}
