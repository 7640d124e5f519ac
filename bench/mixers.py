"""Trains models that differ in their mixers alone, at equal parameters, and compares their held-out losses.

    python bench/mixers.py [--patterns S L LLLS DDDS] [--steps 120] [--out docs/benchmarks/mixers.json]

The quickstart's model and corpus (`make train` prepares it), two ranks of one thread each. The inner width of the MLP
makes up for what a mixer has more or fewer parameters than the others. Draws the losses beside the JSON file (extra
`bench`). Some ten minutes on two cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import tyro

from bench.common.tools import show
from bench.common.tree import ROOT, with_checkout
from lsys.config.load import load
from lsys.config.model import Model
from lsys.config.overrides import parse_overrides
from lsys.observe.flops import parameters

CONFIG = ROOT / "configs" / "quickstart.yaml"
TRAINING, HELD_OUT = "loss_metrics/global_avg_loss", "loss_metrics/validation_loss"


@dataclass(frozen=True)
class Options:
    """Held-out losses of models that differ in their mixers alone."""

    patterns: tuple[str, ...] = ("S", "L", "LLLS", "DDDS")
    steps: int = 120
    every: int = 20
    """Steps between validations."""
    seed: int = 1234
    out: Path | None = None
    """Where the figures go, as JSON, and the plot, as SVG."""


def model(pattern: str, ffn: int | None = None) -> Model:
    words = [f"--model.pattern={pattern}"] + ([f"--model.ffn={ffn}"] if ffn else [])
    return load(CONFIG, parse_overrides(words)).model


def equal_width(pattern: str, wanted: int) -> int:
    """The inner width of the MLP, a multiple of 8, that brings the parameters next to the wanted number."""
    base = model(pattern)

    def distance(ffn: int) -> int:
        return abs(sum(parameters(base.model_copy(update={"ffn": ffn})).values()) - wanted)

    return min(range(8, 4096, 8), key=distance)


def train(pattern: str, ffn: int, options: Options, folder: str) -> float:
    """Seconds of a run of `lsys train` on two ranks."""
    words = [
        f"--model.pattern={pattern}", f"--model.ffn={ffn}", f"--train.steps={options.steps}", f"--train.folder={folder}",
        f"--train.validate_every={options.every}", f"--train.seed={options.seed}", "--checkpoint.save=false",
    ]  # fmt: skip
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "lsys"]
    started = time.perf_counter()
    done = subprocess.run(
        [*torchrun, "train", str(CONFIG), *words],
        cwd=ROOT,
        env=with_checkout(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{pattern}: {done.stdout}{done.stderr}")
    return time.perf_counter() - started


def curves(folder: str) -> dict[str, list[list[float]]]:
    """Training and held-out losses by step, from the run's TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{folder}/tensorboard").Reload()
    return {tag: [[point.step, point.value] for point in events.Scalars(tag)] for tag in (TRAINING, HELD_OUT)}


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "lsys",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.4))
    for pattern, run in figures.items():
        axis.plot(*zip(*run["curves"][HELD_OUT], strict=True), marker=".", label=f"{pattern} {run['loss']:.3f}")
    axis.set(xlabel="step", ylabel="held-out loss, nats per byte")
    axis.legend(frameon=False, title="pattern, last loss")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    print(path)


def main(options: Options) -> None:
    wanted = sum(parameters(model("LLLS")).values())
    figures: dict[str, Any] = {}
    rows: list[list[Any]] = []
    for pattern in options.patterns:
        ffn = equal_width(pattern, wanted)
        with tempfile.TemporaryDirectory() as folder:
            seconds = train(pattern, ffn, options, folder)
            found = curves(folder)
        loss, count = found[HELD_OUT][-1][1], sum(parameters(model(pattern, ffn)).values())
        figures[pattern] = {"ffn": ffn, "parameters": count, "loss": loss, "seconds": seconds, "curves": found}
        rows.append([pattern, ffn, count, loss, seconds])
        show(f"{options.steps} steps", ["pattern", "ffn", "parameters", "held-out", "seconds"], rows)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
        draw(figures, options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main(tyro.cli(Options))
