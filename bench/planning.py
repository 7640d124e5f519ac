"""How long one rank plans softmax attention over very many documents, by method, mask and layout.

    python bench/planning.py [--documents 10000] [--ranks 64] [--rank 32] [--best-of 3]

Lengths are lognormal, some 0 and some 1, about 400 tokens on average. Prints Markdown, in seconds of CPU time: the
schedule; the rank's route with its tiles; the launches of all tiles for the backend on CPU and for variable-length
kernels on CUDA (without the copies to the device). All of it happens once for a layout, whatever the number of layers.
Other processes on the machine disturb the figures: each is the best of several.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.kernels.softmax_attention import Tiles, cpu, cuda
from lsys.parallel.attention.route import Route, route
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.methods import SOFTMAX, Method

Result = TypeVar("Result")

MASKS = {"causal": Mask(), "window 1024": Mask(window=1024), "full": Mask(causal=False)}
HEADS, NODE = 32, 8  # query heads, ranks of a node: what methods group ranks by


def draw(documents: int) -> list[int]:
    """Lengths of documents."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(documents, generator=generator).mul(1.2).exp() * 200).long()
    lengths[::97], lengths[::89] = 0, 1
    return lengths.tolist()


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and seconds of CPU time."""
    began = time.process_time()
    return run(), time.process_time() - began


def all_tiles(found: Route) -> list[Tiles]:
    """What a forward pass attends to."""
    if found.whole is not None:
        return [found.whole]
    return [tiles for step in found.steps for tiles in (step.local, step.remote) if len(tiles)]


def launches_of(make: Callable[[Tiles, Tensor], list[Any]], tiles: list[Tiles]) -> list[list[Any]]:
    """A backend's launches for each of the tables."""
    return [make(table, torch.zeros(1)) for table in tiles]


def plan(method: Method, layout: SequenceLayout, rank: int, mask: Mask) -> tuple[list[float], list[int]]:
    """Seconds of the schedule, the route and the two kinds of launches; how many tiles and launches there are."""
    generate, groups = method.function(), method.groups([rank // NODE for rank in range(layout.ranks)], HEADS)
    began = time.process_time()
    if len(groups) < layout.ranks:
        rank = next(number for number, group in enumerate(groups) if rank in group)
        layout = layout.pooled(groups)
    schedule = generate(layout, mask)
    seconds = [time.process_time() - began]
    found, taken = timed(lambda: route(schedule, layout, rank, mask))
    seconds.append(taken)
    tiles, numbers = all_tiles(found), [sum(map(len, all_tiles(found)))]
    for make in (cpu.plan, cuda.ATEN.plan):
        launches, taken = timed(partial(launches_of, make, tiles))
        seconds.append(taken)
        numbers.append(sum(map(len, launches)))
    return seconds, numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--best-of", type=int, default=3)
    options = parser.parse_args(arguments)
    lengths = draw(options.documents)
    print(f"{options.documents} documents, {sum(lengths)} tokens, rank {options.rank} of {options.ranks}\n")
    print(
        "| layout | mask | method | schedule | route | sum | launches, CPU | launches, CUDA | tiles | of them, CPU | CUDA |"
    )
    print("|---" * 11 + "|")
    for name in ("contiguous", "zigzag"):
        make = getattr(SequenceLayout, name)
        for title, mask in MASKS.items():
            for method in SOFTMAX.values():
                runs = [plan(method, make(lengths, options.ranks), options.rank, mask) for _ in range(options.best_of)]
                schedule, taken, *launches = map(min, zip(*(seconds for seconds, _ in runs), strict=True))
                row = [f"{x:.3f}" for x in (schedule, taken, schedule + taken, *launches)]
                print(f"| {name} | {title} | {method.name} | {' | '.join(row)} | {' | '.join(map(str, runs[0][1]))} |")


if __name__ == "__main__":
    main()
