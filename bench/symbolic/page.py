"""docs/benchmarks/gpu-counts.md from its table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.symbolic.table import COPIES

GIB = 2**30
HEAD = """# What a step does to a GPU, counted without one

`python bench/gpu_counts.py --out docs/benchmarks/gpu-counts.json --page docs/benchmarks/gpu-counts.md`: planning, Megatron,
autograd and lsys run as they are; tensors of CUDA have no numbers, and peers answer without being there.
Nothing here is a time. A launch is an operation of aten that writes, or a kernel of Triton; an operation may be more than one kernel inside.

Models of four layers of hybrid_1b's width (hidden 2,048, 16 heads of 128), 8,192 tokens a rank, many documents a
micro-batch in zigzag, no recomputation, seen by the first context rank."""


def page(table: dict[str, Any]) -> str:
    lines = [HEAD, "", "## Launches of one layer", "", *_launches(table["cases"])]
    lines += ["", "## Copies and stops of one micro-batch", "", *_copies(table["cases"])]
    if table["memory"]:
        lines += ["", "## Peak memory of recipes", "", *_memory(table["memory"])]
    return "\n".join(lines) + "\n"


def _launches(cases: dict[str, Any]) -> Iterator[str]:
    contexts: list[int] = []
    found: dict[tuple[str, str], dict[int, str]] = {}
    rest: dict[str, set[int]] = {}
    for name, case in cases.items():
        context = int(name.split()[-1])
        contexts += [] if context in contexts else [context]
        for row in case["layers"]:
            mixer = " + ".join(f"{row[way]['mixer']:,}" for way in ("forward", "backward"))
            found.setdefault((row["mixer"], row["method"]), {}).setdefault(context, mixer)
            for part in ("channel mixer", "rest"):
                for way in ("forward", "backward"):
                    rest.setdefault(f"{part}, {way}", set()).add(row[way][part])
    contexts.sort()
    yield "Of the mixer, projections included, forward + backward:"
    yield ""
    yield f"| mixer | method | {' | '.join(f'context {context}' for context in contexts)} |"
    yield f"|---|---|{'---|' * len(contexts)}"
    for (mixer, method), by in sorted(found.items()):
        yield f"| {mixer} | {method} | {' | '.join(by.get(context, '') for context in contexts)} |"
    yield ""
    told = "; ".join(f"{name} {' or '.join(map(str, sorted(counts)))}" for name, counts in rest.items())
    yield f"The rest of a layer, at every context: {told}."


def _copies(cases: dict[str, Any]) -> Iterator[str]:
    yield "Copies in the passes by the memory that they come from, copies of the batch itself, and where the host waits for the device:"
    yield ""
    yield "| model | pageable | pinned, waited for | pinned | batch | in layers | after the passes | in the update |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, case in cases.items():
        figures = (*(case["copies"][kind] for kind in reversed(COPIES)), case["copies of the batch"])
        stops = (case["stops in layers"], case["stops in passes"], case["stops in the update"])
        yield f"| {name} | {' | '.join(map(str, (*figures, *stops)))} |"


def _memory(memory: dict[str, Any]) -> Iterator[str]:
    yield "One document as long as a micro-batch; predicted: `lsys check`'s."
    yield ""
    yield "| recipe | symbolic, GiB | predicted, GiB | ratio |"
    yield "|---|---|---|---|"
    for name, sizes in memory.items():
        made, predicted = sizes["symbolic"], sizes["predicted"]
        yield f"| {name} | {made / GIB:.2f} | {predicted / GIB:.2f} | {made / predicted:.3f} |"
