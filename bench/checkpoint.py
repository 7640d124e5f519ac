"""Saves and loads one engine's state by lsys and by torch's distributed checkpoint, in turns in one run; and what memory that takes.

    OMP_NUM_THREADS=1 python bench/checkpoint.py [--ranks 1 2 4] [--out docs/benchmarks/checkpoint.json]

Both write and read the same tensors: the model's and the distributed optimizer's, each rank its own, files synchronised with the disk, into a file
system in memory (`--folder` for another) whose cache is warm. What lsys does beside, torch does not: the hash of every file, written and verified,
the manifest, the renaming, the check of the configuration. Seconds are the slowest rank's, the best of the repeats, and so are CPU seconds, all threads
together, which other jobs on the machine change little. Memory is the most of any rank beyond what it had, beside what it holds: the model's slice,
and its part of the optimizer's states.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import json
import tempfile
from dataclasses import dataclass

import torch
import tyro

from bench.common.tools import launch, made_on, show
from lsys.observe.efficiency import commit, hardware_name, versions


@dataclass(frozen=True)
class Options:
    """Checkpoints by lsys and by torch."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Data ranks of each measurement."""
    repeats: int = 5
    hidden: int = 2048
    layers: int = 2
    folder: Path = Path("/dev/shm")
    out: Path | None = None
    """Where the figures go, as JSON."""


def case(options: Options, folder: str) -> object:
    from bench.workers.checkpoint import Case

    heads = options.hidden // 64
    words = {
        "model.hidden": options.hidden, "model.layers": options.layers, "model.heads": heads, "model.groups": heads // 2,
        "model.linear.heads": heads, "model.linear.head_dim": 64,
    }  # fmt: skip
    return Case(tuple(f"--{key}={value}" for key, value in words.items()), options.repeats, folder)


def main(options: Options) -> None:
    figures: list[dict[str, object]] = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
            (found,) = launch("checkpoint.py", [case(options, f"{folder}/checkpoints")], ranks)
        row: dict[str, object] = {
            "ranks": ranks,
            "shard MiB": found["shard"] / 2**20,
            "file MiB": found["bytes"]["lsys"] / 2**20,
        }
        for what in ("save", "load"):
            speeds = {}
            for way in ("lsys", "torch"):
                seconds, work, memory = zip(*found["seen"][f"{way} {what}"], strict=True)
                speeds[way] = [found["bytes"][way] / 2**20 / min(each) for each in (seconds, work)]
                row[f"{way} {what} MiB/s"], row[f"{way} {what} MiB/CPU s"] = speeds[way]
                row[f"{way} {what} memory"] = max(memory) / found["shard"]
            row[f"{what} ratio"], row[f"{what} CPU ratio"] = (a / b for a, b in zip(*speeds.values(), strict=True))
        figures.append(row)
        show(f"{ranks} data ranks", ["", "lsys", "torch", "ratio"], table(row))
    print("\nmemory: the most beyond what a rank held, of its shard")
    print(made_on(hardware_name(torch.device("cpu")), versions(), commit()))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


def table(row: dict[str, object]) -> list[list[object]]:
    def line(what: str, name: str, ratio: str = "") -> list[object]:
        return [f"{what} {name}", row[f"lsys {what} {name}"], row[f"torch {what} {name}"], row.get(ratio, "")]

    lines = []
    for what in ("save", "load"):
        lines.append(line(what, "MiB/s", f"{what} ratio"))
        lines.append(line(what, "MiB/CPU s", f"{what} CPU ratio"))
        lines.append(line(what, "memory"))
    return [*lines, *([name, row[name], "", ""] for name in ("shard MiB", "file MiB"))]


if __name__ == "__main__":
    main(tyro.cli(Options))
