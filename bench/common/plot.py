"""Draws the figures of `bench/attention.py` and `bench/scaling.py`."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "lsys", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

COLOURS = {"ring": "tab:blue", "gather": "tab:orange", "ulysses": "tab:green", "usp": "tab:red"}


def draw_replay(figures: dict[str, Any], path: Path) -> None:
    """Seconds by number of ranks, for each way and layout, over fast and over slow links."""
    heads, rows = figures["heads"], figures["rows"]
    columns = [number for number, head in enumerate(heads) if head.endswith(" s")]
    figure, axes = plt.subplots(1, len(columns), figsize=(4.2 * len(columns), 3.4), sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        for method, colour in COLOURS.items():
            for layout, style in (("zigzag", "-"), ("contiguous", ":")):
                points = [(row[0], row[column]) for row in rows if row[1:3] == [method, layout]]
                axis.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=f"{method}, {layout}")
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=f"{heads[column][:-2]} links")
        axis.set_xticks(sorted({row[0] for row in rows}), sorted({row[0] for row in rows}))
    axes[0].set_ylabel("seconds, forward and backward")
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def draw_memory(figures: dict[str, Any], path: Path) -> None:
    """Peak live bytes of a rank against the number of ranks, and the fit."""
    ranks, peaks, fit = zip(*figures["rows"], strict=True)
    figure, axis = plt.subplots(figsize=(4.2, 3.2))
    axis.plot(ranks, peaks, "o", color="tab:blue", label="measured")
    label = f"{figures['fixed']:.2f} + {figures['shared']:.1f} / ranks"
    axis.plot(ranks, fit, "-", color="tab:grey", label=label)
    axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel="peak live tensors of a rank, MB")
    axis.set_xticks(ranks, ranks)
    axis.legend(frameon=False)
    _save(figure, path)


def draw_overlap(figures: dict[str, Any], path: Path) -> None:
    """Time over that of computation alone."""
    figure, axis = plt.subplots(figsize=(4.2, 2))
    names, ratios = [row[0] for row in figures["rows"]][::-1], [row[2] for row in figures["rows"]][::-1]
    bars = axis.barh(names, ratios, color=["tab:blue", "tab:grey", "lightgrey"])
    axis.bar_label(bars, fmt="%.2f")
    axis.set_xlabel("time over that of the computation alone")
    _save(figure, path)


def draw_scaling(figures: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Efficiency by number of ranks, a picture for each kind of layers and a colour for each kind of links."""
    figure, axes = plt.subplots(1, len(figures), figsize=(4.2 * len(figures), 3.4), sharey=True)
    for axis, (way, links) in zip(axes, figures.items(), strict=True):
        for colour, (link, points) in zip(("tab:blue", "tab:orange", "tab:red"), links.items(), strict=True):
            for kind, style in (("replay", "-"), ("predicted", ":"), ("measured", "o")):
                shown = [point for point in points if kind in point["efficiency"]]
                if kind == "measured":
                    shown = [point for point in shown if not point["shares_cores"]]
                xs, ys = [p["ranks"] for p in shown], [100 * p["efficiency"][kind] for p in shown]
                axis.plot(xs, ys, style, color=colour, label=f"{link}, {kind}")
        ranks = [point["ranks"] for point in points]
        axis.set(xscale="log", xlabel="ranks", title=way, ylim=(0, 120))
        axis.set_xticks(ranks, ranks)
        axis.minorticks_off()
    axes[0].set_ylabel("FLOP/s of a rank, % of one rank alone")
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    print(path)
