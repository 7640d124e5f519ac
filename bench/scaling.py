"""Weak scaling over context ranks, of a hybrid and of pure softmax attention, on one node and across nodes of a lab.

    OMP_NUM_THREADS=1 python bench/scaling.py --hardware build/this-machine.json --out docs/benchmarks/scaling

Every rank has as many tokens of one micro-batch, so the micro-batch grows with the ranks. A sweep is one `lsys bench scaling`: a run at
each number of ranks, the replay of one of its steps over the links that were measured in it, and the prediction on a calibration
(`bench/predict.py` makes one). Replay and prediction give each rank a core of its own; the latter takes one document as long as the
micro-batch, and links between nodes as they are shaped. Seconds are of other documents in each column (wall-clock: the median of the
run; replay: its first step); compare efficiencies, a rank's model FLOP/s over those of one rank alone. Long documents can exceed 100%:
attention runs nearer to the peak than what else a token costs. Wall-clock is told only where ranks have cores of their own. Nodes are
network namespaces (root); `make train` prepares the corpus. 40 minutes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import json
import os
import tempfile
from typing import Any

from bench.common.plot import draw_scaling
from bench.common.tools import made_on
from bench.common.tree import ROOT, with_checkout
from lsys.bench.scaling import ScalingOptions
from lsys.bench.scaling import main as sweep
from lsys.config.overrides import Override, parse_overrides
from lsys.parallel.links import NETWORK

WAYS = {
    "LLLS, lasp2 and ring": {"model.pattern": "LLLS", "parallel.linear": "lasp2", "parallel.attention": "ring"},
    "S, ring": {"model.pattern": "S", "parallel.attention": "ring"},
    "S, ulysses": {"model.pattern": "S", "parallel.attention": "ulysses"},
}
# Nodes of each point, the lab's rate, bytes/s between nodes.
LINKS = {"one node": ("1,1,1", "", None), "1gbit": ("1,2,2", "1gbit", 125e6), "100mbit": ("1,2,2", "100mbit", 12.5e6)}
HEADS = [
    "layers", "ranks", "nodes", "links", "measured s", "efficiency", "replayed s", "efficiency", "compute",
    "exposed: context", "other axes", "waiting", "predicted s", "efficiency",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank and step, in one micro-batch")
    parser.add_argument("--steps", type=int, default=6, help="steps of each run")
    parser.add_argument("--hardware", default="", help="JSON of a calibration, to predict each run too")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and OUT.svg")
    options = parser.parse_args()
    os.environ.update(with_checkout())  # the runs of a sweep find lsys as this process does
    figures = {way: {link: points(options, way, link) for link in LINKS} for way in WAYS}
    print(table(figures))
    if options.out:
        said = f"{options.tokens} tokens a rank, {options.steps} steps a run, {options.config.name}"
        write(figures, said, options.out)


def write(figures: dict[str, dict[str, list[dict[str, Any]]]], said: str, out: Path) -> None:
    """The page, its picture and the figures that both are made of."""
    out.with_suffix(".json").write_text(json.dumps({"options": said, "sweeps": figures}, indent=1) + "\n")
    first = next(iter(next(iter(figures.values())).values()))[0]["measured"]
    said += f"; {made_on(first['hardware'], first['versions'], first['commit'])}"
    page = f"# Weak scaling\n\n{__doc__}\nHere: {said}.\n\n![efficiency by ranks]({out.name}.svg)\n\n{table(figures)}\n"
    out.with_suffix(".md").write_text(page)
    draw_scaling(figures, out.with_suffix(".svg"))


def points(options: argparse.Namespace, way: str, link: str) -> list[dict[str, Any]]:
    """The points of one sweep, as `lsys bench scaling` stores them."""
    with tempfile.TemporaryDirectory() as folder:
        asked, overrides = asks(options, way, link, Path(folder))
        sweep(asked, overrides)
        return json.loads((asked.out / "scaling.json").read_text())["points"]


def asks(options: argparse.Namespace, way: str, link: str, folder: Path) -> tuple[ScalingOptions, list[Override]]:
    """What one sweep is asked for."""
    nodes, rate, bandwidth = LINKS[link]
    changes = WAYS[way] | {"train.micro_batch_tokens": options.tokens, "train.batch_tokens": options.tokens}
    overrides = parse_overrides([word for key, value in changes.items() for word in (f"--{key}", str(value))])
    hardware = ""
    if options.hardware:
        tree = json.loads(Path(options.hardware).read_text()) | {"cores": None}
        tree["links"][NETWORK][1] = bandwidth or tree["links"][NETWORK][1]
        hardware = str(folder / "hardware.json")
        Path(hardware).write_text(json.dumps(tree))
    asked = ScalingOptions(
        options.config, ranks="1,2,4", nodes=nodes, rate=rate, steps=options.steps, hardware=hardware,
        out=folder / "sweep",
    )  # fmt: skip
    return asked, overrides


def table(figures: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    rows = [HEADS, ["---"] * len(HEADS)]
    for way, links in figures.items():
        for link, found in links.items():
            rows += [[way, *row(link, point)] for point in found]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(link: str, point: dict[str, Any]) -> list[str]:
    """Seconds of a step and efficiency each way; of the replayed step, the shares of its parts."""
    parts, whole = point["replay"]["parts"], point["replay"]["step_seconds"]
    context = parts.get("exposed_context", 0.0)
    others = sum(seconds for name, seconds in parts.items() if name.startswith("exposed_")) - context
    shares = [f"{100 * part / whole:.1f}%" for part in (parts["compute"], context, others, parts["waiting"])]
    measured = ["", ""] if point["shares_cores"] else figures_of(point, "measured")
    predicted = figures_of(point, "predicted") if "predicted" in point["efficiency"] else ["", ""]
    where = [str(point["ranks"]), str(point["nodes"]), link if point["nodes"] > 1 else ""]
    return [*where, *measured, *figures_of(point, "replay"), *shares, *predicted]


def figures_of(point: dict[str, Any], way: str) -> list[str]:
    return [f"{point[way]['step_seconds']:.3f}", f"{100 * point['efficiency'][way]:.1f}%"]


if __name__ == "__main__":
    main()
