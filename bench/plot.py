"""Draws the figures of `bench/attention.py`: python bench/plot.py docs/benchmarks/attention.json."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import json

from bench.common.plot import draw_memory, draw_overlap, draw_replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, help="JSON; pictures are written beside it")
    path = parser.parse_args().figures
    figures = json.loads(path.read_text())
    for name, draw in (("replay", draw_replay), ("memory", draw_memory), ("overlap", draw_overlap)):
        if name in figures:
            draw(figures[name], path.with_name(f"{path.stem}-{name}.svg"))


if __name__ == "__main__":
    main()
