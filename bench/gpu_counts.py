"""What a training step does to a GPU, counted without one: launches, copies, stops of the host, memory.

    python bench/gpu_counts.py [--out docs/benchmarks/gpu-counts.json] [--page docs/benchmarks/gpu-counts.md] [--context 1 8 64 512]

Runs the step of models with every token mixer, and of all recipes, as one of up to 512 ranks: planning, Megatron, autograd and lsys as they
are; tensors of CUDA have no numbers, and peers answer without being there (bench/symbolic). Needs g++ once, and a CPU build of torch.
Exit status 1 if a step does not run, makes the host read from the device inside a layer, or leaves two uses of memory without an order;
copies from pageable memory are told, and not held against it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import json
from collections.abc import Sequence
from typing import Any

from bench.symbolic.cases import Case, Result, results
from bench.symbolic.page import page
from bench.symbolic.table import CONTEXTS, figures, recipe_cases, table_cases


def counted(contexts: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """The table, and what is wrong in the steps."""
    cases: dict[str, Case] = {**table_cases(contexts), **recipe_cases()}
    found: dict[str, Result] = dict(zip(cases, results(list(cases.values())), strict=True))
    wrong = [f"{name}: {fault}" for name, result in found.items() for fault in result.unordered]
    for name, result in found.items():
        stops = (*result.listed("stops", "forward"), *result.listed("stops", "backward"))
        wrong += [f"{name}: {what} in a layer: {where}" for what, where, _ in stops]
    memory = {
        name: {"symbolic": each.peak, "predicted": round(each.predicted)}
        for name, each in found.items()
        if cases[name].one_document
    }
    return {"cases": {name: figures(found[name]) for name in cases if name not in memory}, "memory": memory}, wrong


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu-counts.json"))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--context", type=int, nargs="+", default=list(CONTEXTS))
    options = parser.parse_args(words)
    table, wrong = counted(options.context)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(table, indent=1) + "\n")
    print(page(table))
    if options.page is not None:
        options.page.write_text(page(table))
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
