"""How TensorBoard shows a run: groups of charts on one page, hyperparameters, texts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsys.config.reports import LOSS, Metric, declared
from lsys.config.schema import Config
from lsys.observe.folder import mark_folder, tensorboard_folder
from lsys.observe.waterfall import COMPUTE, Waterfall
from lsys.parallel.mesh import AXES, Mesh

# The borders of a part in the stack of the waterfall. TensorBoard has one colour for each run, not for each tag: so each part
# is a run of its own, in a folder of this name.
STACK = "waterfall"
# Its custom scalars take what follows the first parenthesis of a tag for the name of the run, and draw nothing. So what has
# one, as names with units do, is written once more without, in a run of this name.
PAGE = "page"
LEAST = 0.1  # %; a part is shown from when it first takes as much
LOWER, UPPER = "waterfall_stack/lower", "waterfall_stack/upper"


@dataclass(frozen=True)
class Lines:
    """A chart of lines.

    Attributes:
        tags: regular expressions; TensorBoard draws every tag that matches one. Of tags with units, see `page_tag`.
    """

    title: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Bands:
    """A chart of areas: of each run that between two tags."""

    title: str
    lower: str
    upper: str


@dataclass(frozen=True)
class Group:
    """A section of the page of custom scalars; it is shown where the run has what it is about."""

    title: str
    charts: tuple[Lines | Bands, ...]


def groups(waterfall: bool, metrics: Sequence[Metric] = ()) -> list[Group]:
    """The sections of a run, with or without a waterfall; of what layers and losses report, one for each first name."""
    training = Group(
        "training",
        (
            Lines("loss", (r"loss_metrics/global_avg_loss", r"loss_metrics/validation_loss")),
            *_reported(metrics).pop("loss_metrics", ()),
            Lines("gradient norm", ("grad_norm",)),
            Lines("learning rate", ("lr",)),
        ),
    )
    speed = Group(
        "speed",
        (
            Lines("scaling efficiency, %", (r"scaling/.*efficiency %",)),
            Lines("tokens/s of a rank", ("throughput tps",)),
            Lines("s of a step", ("time_metrics/end_to_end s",)),
            Lines("MFU, %", ("mfu %",)),
        ),
    )
    title = "where a step's time goes, % (mean of the ranks), one part upon the other"
    time = Group("scaling waterfall", (Bands(title, LOWER, UPPER),))
    ranks = Group(
        "parts and ranks",
        (
            Lines("all parts but compute, %", (r"waterfall/(?!compute).* %",)),
            Lines("own work of the quickest rank, the mean and the slowest, ms", (r"ranks/compute_.* ms",)),
            Lines("which rank is the slowest", (r"ranks/slowest",)),
        ),
    )
    communication = Group(
        "communication",
        (
            Lines("exposed, ms of a step", (r"comm/.*/exposed ms",)),
            Lines("total, ms of a step", (r"comm/.*/total ms",)),
            Lines("bytes that a rank sends in a step", (r"comm/.*/bytes",)),
        ),
    )
    memory = Group("memory", (Lines("GiB", (r"memory/.* GiB",)),))
    reported = [Group(name, charts) for name, charts in _reported(metrics).items() if name != "loss_metrics"]
    return [training, *reported, speed, *([time, ranks, communication] if waterfall else []), memory]


def _reported(metrics: Sequence[Metric]) -> dict[str, tuple[Lines, ...]]:
    """A chart for each metric but the loss, by the first part of their names; a vector's numbers are lines of one."""
    charts: dict[str, tuple[Lines, ...]] = {}
    for metric in metrics:
        if metric.shown and metric.name != LOSS:
            first, _, rest = metric.name.partition("/")
            expression = re.escape(page_tag(metric.name)) + r"/\d+" * (metric.size > 1)
            charts[first] = (*charts.get(first, ()), Lines(rest or first, (expression,)))
    return charts


def page_tag(tag: str) -> str:
    """`mfu(%)` as the page of custom scalars can draw it: `mfu %`."""
    return tag.replace("(", " ").replace(")", "")


def layout(chosen: Sequence[Group]) -> Any:
    """The summary that tells TensorBoard's custom scalars about the groups."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    page = layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=group.title, chart=[_chart(chart, layout_pb2) for chart in group.charts])
            for group in chosen
        ]
    )
    kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME))
    tensor = TensorProto(dtype="DT_STRING", string_val=[page.SerializeToString()])
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=kind)])


def _chart(chart: Lines | Bands, proto: Any) -> Any:
    if isinstance(chart, Lines):
        return proto.Chart(title=chart.title, multiline=proto.MultilineChartContent(tag=chart.tags))
    series = proto.MarginChartContent.Series(value=chart.upper, lower=chart.lower, upper=chart.upper)
    return proto.Chart(title=chart.title, margin=proto.MarginChartContent(series=[series]))


def stacked(percent: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Scalars of each part's lower and upper border, %, one part upon the other."""
    borders, upper = {}, 0.0
    for part, value in percent.items():
        lower, upper = upper, upper + value
        borders[part] = {LOWER: lower, UPPER: upper}
    return borders


def hyperparameters(config: Config, ranks: int) -> dict[str, bool | float | str]:
    """What the HParams page compares runs by: degrees, sizes, methods."""
    chosen: dict[str, bool | float | str] = {"ranks": ranks}
    for section in ("model", "parallel", "optimizer", "train"):
        for key, value in getattr(config, section).model_dump(mode="json").items():
            if isinstance(value, (bool, int, float, str)):
                chosen[f"{section}.{key}"] = value
    return chosen


def hyperparameter_summaries(config: Config, ranks: int) -> tuple[Any, ...]:
    """The summaries of one session of the HParams page, which takes the run's own curves for its metrics."""
    from torch.utils.tensorboard.summary import hparams

    metrics = (
        "loss_metrics/global_avg_loss",
        "loss_metrics/validation_loss",
        "throughput(tps)",
        "scaling/efficiency(%)",
    )
    return hparams(hyperparameters(config, ranks), dict.fromkeys(metrics, 0.0))


def rank_grid(mesh: Mesh, nodes: Sequence[int], limit: int = 256) -> str:
    """A Markdown table: node and coordinates of each rank."""
    axes = [axis for axis in AXES if mesh.degree(axis) > 1]
    heads = ["rank", "node", *axes]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for rank in range(min(mesh.world_size, limit)):
        place = mesh.coordinates(rank)
        lines.append(" | ".join(map(str, (rank, nodes[rank], *(place[axis] for axis in axes)))))
    if mesh.world_size > limit:
        lines.append(f"... and {mesh.world_size - limit} more ranks")
    return "\n".join(lines)


class Board:
    """TensorBoard's files of a run; the first rank has one.

    Args:
        first_step: points of an earlier part of the run from this step on are dropped, so the curve of a resumed run is one.
        nodes: of each rank. text: the resolved configuration.
    """

    def __init__(self, config: Config, *, mesh: Mesh, nodes: Sequence[int], first_step: int, text: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        mark_folder(config)
        self.nodes, self.first_step = nodes, first_step
        self.folder = tensorboard_folder(config)
        self.writer = SummaryWriter(str(self.folder), purge_step=first_step)
        self.page = SummaryWriter(str(self.folder / PAGE), purge_step=first_step)
        self.parts: dict[str, Any] = {}  # a writer for each part of the waterfall
        self.writer.add_text("config", f"```yaml\n{text}```", first_step)
        self.writer.add_text("ranks", rank_grid(mesh, nodes), first_step)
        summaries = (
            layout(groups(config.metrics.waterfall_every > 0, declared(config))),
            *hyperparameter_summaries(config, mesh.world_size),
        )
        for summary in summaries:
            self.writer._get_file_writer().add_summary(summary)  # what add_custom_scalars does

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
            if page_tag(tag) != tag:
                self.page.add_scalar(page_tag(tag), value, step)

    def waterfall(self, step: int, waterfall: Waterfall) -> None:
        """Curves of the parts, their stack, and the picture of the ranks."""
        from torch.utils.tensorboard import SummaryWriter

        from lsys.observe.picture import ranks_picture

        self.scalars(step, waterfall.scalars | _of_ranks(waterfall))
        for part, borders in stacked(waterfall.percent).items():
            if part not in self.parts:
                if borders[UPPER] - borders[LOWER] < LEAST:
                    continue
                self.parts[part] = SummaryWriter(str(self.folder / STACK / part), purge_step=self.first_step)
            for tag, value in borders.items():
                self.parts[part].add_scalar(tag, value, step)
        title = f"step {step}: {1e3 * waterfall.seconds:,.0f} ms, and each rank's own work in it"
        picture = ranks_picture(waterfall.per_rank, self.nodes, title)
        self.writer.add_image("ranks/time", picture, step, dataformats="HWC")

    def close(self) -> None:
        for writer in (self.writer, self.page, *self.parts.values()):
            writer.close()


def _of_ranks(waterfall: Waterfall) -> dict[str, float]:
    """Own work of the quickest rank, the mean and the slowest, and which that is."""
    own = [1e3 * rank[COMPUTE] for rank in waterfall.per_rank]
    return {
        "ranks/compute_min(ms)": min(own),
        "ranks/compute_mean(ms)": sum(own) / len(own),
        "ranks/compute_max(ms)": max(own),
        "ranks/slowest": float(own.index(max(own))),
    }
