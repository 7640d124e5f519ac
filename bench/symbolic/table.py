"""Launches of layers as one table: what bench/gpu_counts.py writes and tests compare with a fresh count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.symbolic.cases import Case, Result

# Every token mixer, in models of four layers, by letters of `model.pattern`.
PATTERNS = ("SLRG", "WMDN", "KSLM")
CONTEXTS = (1, 8, 64, 512)
TOKENS = 8192  # of a rank
METHODS = {
    "linear": ("SLRG", ("lasp1", "zeco", "ulysses")),
    "attention": ("SLWL", ("ring", "gather", "usp")),
}
RECIPES = (("configs/hybrid_1b.yaml", 64), ("configs/delta_1b.yaml", 64), ("configs/hybrid_7b_256k.yaml", 512))
COPIES = ("pinned", "pinned, waited for", "pageable")
PARTS = ("mixer", "channel mixer", "rest")
Row = dict[str, Any]


def mixers(context: int, pattern: str, *more: str) -> Case:
    """Four layers of hybrid_1b's width, no recomputation, one micro-batch of many documents; the first rank of the context group."""
    overrides = (f"model.pattern={pattern}", f"model.layers={len(pattern)}", f"parallel.context={context}")
    sizes = (
        f"train.micro_batch_tokens={TOKENS * context}",
        f"train.batch_tokens={TOKENS * context}",
        "train.recompute=none",
    )
    return Case("configs/hybrid_1b.yaml", context, 0, (*overrides, *sizes, *more), micro_batches=1)


def table_cases(contexts: Sequence[int] = CONTEXTS) -> dict[str, Case]:
    """By what tells them apart: all mixers as `auto` and the defaults take them, then by other methods, where there are others."""
    found = {f"{pattern} context {context}": mixers(context, pattern) for context in contexts for pattern in PATTERNS}
    for axis, (pattern, methods) in METHODS.items():
        for method in methods:
            for context in contexts:
                if 1 < context <= 64:
                    found[f"{pattern} {method} context {context}"] = mixers(
                        context, pattern, f"parallel.{axis}={method}"
                    )
    return found


def recipe_cases() -> dict[str, Case]:
    """Every recipe with one long document, as the predictor takes it: a rank of the first stage, and of the last where there are several."""
    found = {}
    for config, world in RECIPES:
        for rank in (0, world - 1) if world > 64 else (0,):
            found[f"{config} rank {rank} of {world}"] = Case(
                config, world, rank, micro_batches=8 if world > 64 else 2, one_document=True
            )
    return found


def rows(result: Result) -> Iterator[Row]:
    """By kind and method: launches of a layer's parts in each direction; of several layers of a kind the last, whose tables are there."""
    last = {tuple(kind): number for number, kind in result.layers.items()}
    for (mixer, method), number in last.items():
        row: Row = {"mixer": mixer, "method": method}
        for way in ("forward", "backward"):
            row[way] = {part: result.launches(f"{way} layer {number} {part}") for part in PARTS}
        yield row


def figures(result: Result) -> Row:
    """What the table holds of one case."""
    passes = ("forward", "backward", "passes")
    return {
        "layers": list(rows(result)),
        "copies": {
            name: sum(each[2] for part in passes for each in result.listed("copies", part) if each[0] == name)
            for name in COPIES
        },
        "copies of the batch": sum(each[2] for each in result.listed("copies", "plan")),
        "stops in layers": sum(each[2] for way in passes[:2] for each in result.listed("stops", way)),
        "stops in passes": sum(each[2] for each in result.listed("stops", "passes")),
        "stops in the update": sum(each[2] for each in result.listed("stops", "update")),
        "launches of the update": result.launches("update"),
        "messages": _messages(result),
    }


def _messages(result: Result) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in result.parts.values():
        for name, count in part["messages"].items():
            found[name] = found.get(name, 0) + count
    return dict(sorted(found.items()))
