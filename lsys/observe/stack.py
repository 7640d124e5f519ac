"""Where the time goes, drawn: the parts of a step one upon the other, over the steps of a run or for each point of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsys.observe.rank_heatmap import COLOURS, colour
from lsys.observe.waterfall_history import WaterfallHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 600  # of a history; about its pixels
LEAST = 0.1  # %; less cannot be seen
LABEL = "% of a step, mean of the ranks"


def canvas(width: float, height: float, plots: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, with plots side by side. It belongs to no window and no registry: nothing needs to close it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, plots, squeeze=False)[0])


def pixels(figure: Figure) -> np.ndarray:
    """The figure as it is drawn: uint8 [height, width, 3]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def shown(shares: Mapping[str, Sequence[float] | np.ndarray]) -> list[str]:
    """The parts that ever take LEAST, in the order of COLOURS, which is the same in every picture."""
    order = [*COLOURS, *sorted(set(shares) - set(COLOURS))]
    return [part for part in order if part in shares and np.max(shares[part], initial=0) >= LEAST]


def areas(axes: Axes, steps: np.ndarray, shares: Mapping[str, np.ndarray]) -> None:
    """Draw each part, % [n], as an area; a value holds from the step before, exclusive, to its own in `steps`, [n]."""
    parts = shown(shares)
    first = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0
    edges = np.array([first, *steps])
    heights = [np.concatenate((shares[part][:1], shares[part])) for part in parts]
    paint = [colour(part) for part in parts]
    axes.stackplot(edges, heights, labels=parts, colors=paint, step="pre", linewidth=0)
    axes.set_xlim(edges[0], edges[-1])
    _finish(axes)


def bars(axes: Axes, names: Sequence[str], shares: Mapping[str, np.ndarray]) -> None:
    """Draw each part, % [n], as a piece of the bars with these names."""
    bottom = np.zeros(len(names))
    for part in shown(shares):
        axes.bar(range(len(names)), shares[part], bottom=bottom, label=part, color=[colour(part)])
        bottom = bottom + shares[part]
    axes.set_xticks(range(len(names)), names)
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_ylim(0, 100)
    axes.set_ylabel(LABEL)
    handles, labels = axes.get_legend_handles_labels()
    if labels:  # as they lie: the first part at the bottom
        axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def history_picture(history: WaterfallHistory) -> np.ndarray:
    """The waterfall of every report of a run: uint8 [height, width, 3]."""
    figure, (axes,) = canvas(5.6, 3.2)  # TensorBoard shows about half as many pixels as 7 inches are
    steps, shares = history.columns(COLUMNS)
    areas(axes, steps, shares)
    axes.set_xlabel("step")
    axes.set_title("where the time of a step goes", fontsize="medium")
    return pixels(figure)
