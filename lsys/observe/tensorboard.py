"""How TensorBoard shows a run: curves, pictures, hyperparameters, texts, all as one TensorBoard run.

Of the Time Series page TensorBoard makes a group of each first part of the tags' names, in alphabetical order; the first two groups are
open. Pinned cards come before all groups, and an address can pin: `address` does with the losses.
Custom scalars are for what belongs into one chart. They draw no tag with a parenthesis, as names with units have: those are curves
of Time Series only.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lsys.config.reports import LOSS, Metric, declared
from lsys.config.schema import Config
from lsys.observe.run_dir import mark_folder, tensorboard_folder
from lsys.observe.waterfall import COMPUTE, TAGS, Waterfall
from lsys.observe.waterfall_history import read_history

PICTURE = f"{TAGS}all_parts"  # before the parts' own curves
SECTIONS = ("model", "parallel", "data", "optimizer", "train")  # of the configuration, with hyperparameters
VALIDATION = "loss_metrics/validation_loss"
COMPARED = ("tensor", "pipeline", "context", "attention", "linear")  # of `parallel`, in every run


def address(server: str = "http://localhost:6006") -> str:
    """The address of TensorBoard's first page with training and validation loss on top, before `comm`."""
    pins = [{"plugin": "scalars", "tag": tag} for tag in (LOSS, VALIDATION)]
    return f"{server}/?pinnedCards={quote(json.dumps(pins, separators=(',', ':')), safe='')}#timeseries"


@dataclass(frozen=True)
class Chart:
    """A chart of several lines, in a group of charts.

    Attributes:
        tag: a regular expression; TensorBoard draws every tag that matches it.
    """

    group: str
    title: str
    tag: str


def charts(metrics: Sequence[Metric] = ()) -> list[Chart]:
    """What Custom scalars show: training beside validation, one axis beside another, and a vector's numbers, of each that is reported."""
    known = [
        Chart("training", "loss", r"loss_metrics/(global_avg|validation)_loss"),
        Chart("communication", "bytes that a rank sends in a step", r"comm/.*/bytes"),
    ]
    vectors = [metric for metric in metrics if metric.shown and metric.size > 1 and "(" not in metric.name]
    names = [(metric.name, *metric.name.partition("/")) for metric in vectors]
    return known + [Chart(group, rest or group, re.escape(name) + r"/\d+") for name, group, _, rest in names]


def layout(chosen: Sequence[Chart]) -> Any:
    """The summary that tells TensorBoard's custom scalars about the charts."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    def chart(one: Chart) -> Any:
        return layout_pb2.Chart(title=one.title, multiline=layout_pb2.MultilineChartContent(tag=[one.tag]))

    groups: dict[str, list[Any]] = {}
    for one in chosen:
        groups.setdefault(one.group, []).append(chart(one))
    page = layout_pb2.Layout(
        category=[layout_pb2.Category(title=group, chart=found) for group, found in groups.items()]
    )
    tensor = TensorProto(dtype="DT_STRING", string_val=[page.SerializeToString()])
    kind = metadata.create_summary_metadata()
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=kind)])


def hyperparameters(config: Config, ranks: int) -> dict[str, bool | float | str]:
    """What runs are compared by: ranks, degrees and methods of all, and of the rest only what is not the default.

    TensorBoard finds out what differs among the runs that it shows. A run that lacks a key has its default.
    """
    parallel = config.parallel.model_dump(mode="json", include=set(COMPARED))
    chosen: dict[str, Any] = {"ranks": ranks}
    for section in SECTIONS:
        chosen[section] = getattr(config, section).model_dump(mode="json", exclude_defaults=True)
    chosen["parallel"] |= parallel
    del chosen["train"]["folder"]  # is the run's name
    chosen["data"]["corpora"] = ", ".join(str(corpus.path) for corpus in config.data.corpora)
    return dict(_flat(chosen))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


class Pace:
    """When to draw a picture: so seldom that it costs at most 1% of the time, and of a whole run that it lacks at most 2% of it.

    Args:
        clock: gives seconds.
        first: s that the first picture is taken to cost; the default has the import of a library in it. 0: the first is due at once.
        missing: how much of the run the picture may lack; 0 where it is of the newest report only.
    """

    COST = 0.01

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, first: float = 1.0, missing: float = 0.02
    ) -> None:
        self.clock, self.cost, self.missing = clock, first, missing
        self.began = self.last = clock()

    @property
    def is_due(self) -> bool:
        now = self.clock()
        return now - self.last >= max(self.cost / self.COST, self.missing * (now - self.began))

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Around drawing; one that failed is due again as late as one that did not."""
        began = self.clock()
        try:
            yield
        finally:
            self.last = self.clock()
            self.cost = self.last - began


class Board:
    """TensorBoard's files of a run, one TensorBoard run; the first rank has one. Only `flush` writes to the disk.

    Args:
        nodes: of each rank.
        first_step: points of an earlier part of the run from this step on are dropped, so the curve of a resumed run is one, and the
            picture of the waterfall begins where the run did.
        texts: Markdown, by name.
    """

    def __init__(
        self, config: Config, *, ranks: int, nodes: Sequence[int], first_step: int, texts: Mapping[str, str]
    ) -> None:
        from torch.utils.tensorboard.summary import hparams, text

        from lsys.observe.events import EventFile

        self.nodes, self.pace, self.ranks_pace = nodes, Pace(), Pace(first=0.0, missing=0.0)
        self.newest: tuple[int, Waterfall] | None = None  # of which no picture is drawn yet
        folder = tensorboard_folder(config)
        self.history = read_history(folder, first_step)
        self.drawn = len(self.history.steps)  # reports that the newest picture shows
        # Without the summary of an experiment, which says what hyperparameters there are: TensorBoard would take one run's for all.
        _, *session = hparams(hyperparameters(config, ranks), {})
        written = [text(name, words) for name, words in texts.items()]
        beginning = (*written, layout(charts(declared(config))), *session)
        self.writer = EventFile(folder, first_step, beginning, lambda: mark_folder(config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def waterfall(self, step: int, waterfall: Waterfall) -> None:
        """Curves of the parts; what the pictures will be of."""
        self.scalars(step, waterfall.scalars | _of_ranks(waterfall))
        self.history.add(step, waterfall.percent)
        self.newest = step, waterfall

    def draw_ranks(self, last: bool = False) -> None:
        """The ranks' times in the newest report, if it is time for a new picture, or the `last` one."""
        if self.newest is None or not (last or self.ranks_pace.is_due):
            return
        with self.ranks_pace.drawing():
            from lsys.observe.rank_heatmap import ranks_picture

            step, waterfall = self.newest
            title = f"step {step}: {1e3 * waterfall.seconds:,.0f} ms, and each rank's own work in it"
            picture = ranks_picture(waterfall.per_rank, self.nodes, title)
            self.writer.add_image("ranks/time", picture, step)
        self.newest = None

    def draw(self, last: bool = False) -> None:
        """The waterfall of the whole run, if it is time for a new picture, or the `last` one."""
        if len(self.history.steps) == self.drawn or not (last or self.pace.is_due):
            return
        with self.pace.drawing():
            from lsys.observe.stack import history_picture

            self.writer.add_image(PICTURE, history_picture(self.history), self.history.steps[-1])
        self.drawn = len(self.history.steps)

    def flush(self) -> None:
        """Bring what was told to the disk. Raises OSError; what waits then is not lost."""
        self.writer.flush()

    @property
    def lost(self) -> str:
        """What was given up, in words; empty if nothing was."""
        return f"{self.writer.lost} points and pictures, for which memory had no room" if self.writer.lost else ""


def _of_ranks(waterfall: Waterfall) -> dict[str, float]:
    """Own work of the quickest rank, the mean and the slowest, and which that is."""
    own = [1e3 * rank[COMPUTE] for rank in waterfall.per_rank]
    return {
        "ranks/compute_min(ms)": min(own),
        "ranks/compute_mean(ms)": sum(own) / len(own),
        "ranks/compute_max(ms)": max(own),
        "ranks/slowest": float(own.index(max(own))),
    }
