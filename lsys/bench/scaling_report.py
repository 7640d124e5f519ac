"""What `lsys bench scaling` leaves for eyes: a picture, and TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsys.observe.stack import bars, canvas, pixels

STYLES = {"measured": "o-", "replay": "s--", "predicted": "^:"}


def report(summary: Mapping[str, Any], out: Path) -> None:
    """Write scaling.png, and the same picture and curves to TensorBoard; the step of a point is its number of ranks."""
    from torch.utils.tensorboard import SummaryWriter

    picture = draw(summary, out / "scaling.png")
    kind = summary["options"]["scaling"]
    with SummaryWriter(str(out / "tensorboard")) as writer:
        for point in summary["points"]:
            for way, efficiency in point["efficiency"].items():
                writer.add_scalar(f"scaling/{kind}_{way}_efficiency(%)", 100 * efficiency, point["ranks"])
                writer.add_scalar(f"scaling/{kind}_{way}_step(s)", point[way]["step_seconds"], point["ranks"])
        writer.add_image("scaling/efficiency", picture, summary["points"][-1]["ranks"], dataformats="HWC")


def draw(summary: Mapping[str, Any], path: Path) -> np.ndarray:
    """Efficiency over ranks, and beside it where the time of a step goes; uint8 [height, width, 3]."""
    figure, (left, right) = canvas(12, 4.5, plots=2)
    _efficiency(left, summary)
    _waterfalls(right, summary["points"])
    figure.savefig(path, dpi=120)
    return pixels(figure)


def _efficiency(axes: Any, summary: Mapping[str, Any]) -> None:
    points, options = summary["points"], summary["options"]
    ranks = [point["ranks"] for point in points]
    axes.plot(ranks, [100] * len(ranks), color="grey", linewidth=1, label="ideal")
    for way, style in STYLES.items():
        shown = [(p["ranks"], 100 * p["efficiency"][way]) for p in points if way in p["efficiency"]]
        if shown:
            axes.plot(*zip(*shown, strict=True), style, label=way)
    shared = [(p["ranks"], 100 * p["efficiency"]["measured"]) for p in points if p["shares_cores"]]
    if shared:  # wall-clock there says what the cores do, not what the system does
        axes.plot(
            *zip(*shared, strict=True), "o", color="white", markeredgecolor="grey", label="measured, ranks share cores"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(n) for n in ranks])
    highest = max(100 * value for point in points for value in point["efficiency"].values())
    axes.set_ylim(0, 1.1 * max(100.0, highest))
    axes.set_xlabel("ranks")
    axes.set_ylabel("FLOP/s of a rank, % of the first point's")
    axes.set_title(f"{options['scaling']} scaling over {options['axis']}")
    axes.legend()


def _waterfalls(axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    falls = [point["measured"]["waterfall"] or {} for point in points]
    parts = dict.fromkeys(part for fall in falls for part in fall)
    whole = [sum(fall.values()) or 1.0 for fall in falls]
    shares = {
        part: np.array([100 * fall.get(part, 0.0) / all_of for fall, all_of in zip(falls, whole, strict=True)])
        for part in parts
    }
    bars(axes, [f"{p['ranks']} on {p['nodes']}" for p in points], shares)
    axes.set_xlabel("ranks on nodes")
    axes.set_title("where the time goes (measured)")
