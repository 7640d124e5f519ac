"""Weak scaling over context ranks, of a hybrid and of pure softmax attention, on one node and across nodes of a lab.

    OMP_NUM_THREADS=1 python bench/scaling.py --hardware build/this-machine.json --out docs/benchmarks/scaling

Every rank has as many tokens of one micro-batch, so the micro-batch grows with the ranks. A sweep is one `lsys bench scaling`: a run at
each number of ranks, the replay of one of its steps as if each rank had a core of its own, and the prediction on a calibration
(`bench/predict.py` makes one) with the cores there are. Efficiency is a rank's model FLOP/s over those of one rank alone. Wall-clock is
told only where ranks have cores of their own. Nodes are network namespaces (root); `make train` prepares the corpus. Half an hour.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from plot import draw_scaling
from tools import ROOT

from lsys.bench.scaling import ScalingOptions
from lsys.bench.scaling import main as sweep
from lsys.config.overrides import parse_overrides

WAYS = {
    "LLLS, lasp2 and ring": {"model.pattern": "LLLS", "parallel.linear": "lasp2", "parallel.attention": "ring"},
    "S, ring": {"model.pattern": "S", "parallel.attention": "ring"},
    "S, ulysses": {"model.pattern": "S", "parallel.attention": "ulysses"},
}
LINKS = {"one node": ("1,1,1", ""), "1gbit": ("1,2,2", "1gbit"), "100mbit": ("1,2,2", "100mbit")}
HEADS = [
    "layers", "ranks", "nodes", "links", "measured s", "efficiency", "replayed s", "efficiency", "compute",
    "exposed: context", "other axes", "waiting", "predicted s", "efficiency",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank and step, in one micro-batch")
    parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    parser.add_argument("--hardware", default="", help="JSON of a calibration, to predict each run too")
    parser.add_argument("--out", type=Path, help="write OUT.md, OUT.json and OUT.svg")
    options = parser.parse_args()
    figures = {way: {link: points(options, way, link) for link in LINKS} for way in WAYS}
    text = table(figures)
    print(text)
    if options.out:
        command = f"OMP_NUM_THREADS=1 python bench/scaling.py --tokens {options.tokens} --steps {options.steps}"
        options.out.with_suffix(".json").write_text(
            json.dumps({"command": command, "sweeps": figures}, indent=1) + "\n"
        )
        options.out.with_suffix(".md").write_text(f"{text}\n")
        draw_scaling(figures, options.out.with_suffix(".svg"))


def points(options: argparse.Namespace, way: str, link: str) -> list[dict[str, Any]]:
    """The points of one sweep, as `lsys bench scaling` stores them."""
    nodes, rate = LINKS[link]
    changes = WAYS[way] | {"train.micro_batch_tokens": options.tokens, "train.batch_tokens": options.tokens}
    overrides = parse_overrides([word for key, value in changes.items() for word in (f"--{key}", str(value))])
    with tempfile.TemporaryDirectory() as folder:
        asked = ScalingOptions(
            options.config, ranks="1,2,4", nodes=nodes, rate=rate, steps=options.steps, hardware=options.hardware,
            out=Path(folder) / "sweep",
        )  # fmt: skip
        sweep(asked, overrides)
        return json.loads((asked.out / "scaling.json").read_text())["points"]


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
