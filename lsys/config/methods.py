"""Which way softmax and window layers cross the context ranks: as configured, or the cheapest by the cost table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lsys.config.schema import Config

if TYPE_CHECKING:
    from lsys.parallel.attention.cost import Estimate

ITEMSIZE = {"fp32": 4, "bf16": 2}


def attention_costs(config: Config, node_of_rank: Sequence[int]) -> dict[str, tuple[Estimate, ...]]:
    """What each method costs one layer of each kind (`S`, `W`) that the model has.

    For the pack that costs most: one document as long as a micro-batch. Imports torch.

    Args:
        node_of_rank: node of each context rank.
    """
    from lsys.parallel.attention.cost import Shape, choose
    from lsys.parallel.layout import SequenceLayout

    model, tensor = config.model, config.parallel.tensor
    layout = getattr(SequenceLayout, config.parallel.layout)([config.train.micro_batch_tokens], len(node_of_rank))
    shape = Shape(model.heads // tensor, model.kv_heads // tensor, model.head_width, ITEMSIZE[config.train.precision])
    windows = {"S": None, "W": model.window}
    return {
        kind: choose(layout, shape, node_of_rank, window=window)
        for kind, window in windows.items()
        if kind in model.kinds
    }


def attention_methods(config: Config, node_of_rank: Sequence[int]) -> dict[str, str]:
    """The method of each kind of layer; the same on all ranks that share a sequence."""
    if config.parallel.attention != "auto":
        return dict.fromkeys("SW", config.parallel.attention)
    costs = attention_costs(config, node_of_rank)
    return {kind: next(row.method for row in rows if row.chosen) for kind, rows in costs.items()}
