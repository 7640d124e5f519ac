"""What TensorBoard is told: the groups of charts, the stack of the waterfall, texts and pictures."""

import re

import numpy as np
from tensorboard.plugins.custom_scalar import layout_pb2

from lsys.config.reports import Metric
from lsys.observe.picture import COLOURS, colours, ranks_picture
from lsys.observe.tensorboard import LOWER, UPPER, Lines, groups, layout, page_tag, rank_grid, stacked
from lsys.parallel.mesh import Mesh


def read_layout(waterfall=True):
    return layout_pb2.Layout.FromString(layout(groups(waterfall)).value[0].tensor.string_val[0])


def test_the_layout_has_a_group_for_what_the_run_has():
    assert [category.title for category in read_layout().category] == [
        "training", "speed", "scaling waterfall", "parts and ranks", "communication", "memory",
    ]  # fmt: skip
    assert [category.title for category in read_layout(waterfall=False).category] == ["training", "speed", "memory"]


def test_the_areas_of_the_stack_lie_upon_each_other():
    percent = {"compute": 70.0, "exposed_context": 15.0, "imbalance": 10.0, "other": 5.0}
    borders = stacked(percent)
    assert [band[UPPER] - band[LOWER] for band in borders.values()] == list(percent.values())
    assert [band[LOWER] for band in borders.values()] == [0, 70, 85, 95] and borders["other"][UPPER] == 100
    (series,) = next(
        chart.margin.series for chart in read_layout().category[2].chart if chart.title.startswith("where")
    )
    assert (series.lower, series.value, series.upper) == (LOWER, UPPER, UPPER)


def test_every_expression_of_the_layout_matches_what_it_is_for():
    tags = [
        "loss_metrics/global_avg_loss", "grad_norm", "lr", "scaling/efficiency(%)", "throughput(tps)", "mfu(%)",
        "time_metrics/end_to_end(s)", "waterfall/imbalance(%)", "ranks/compute_max(ms)", "ranks/slowest", "comm/context/exposed(ms)",
        "comm/context/total(ms)", "comm/context/bytes", "memory/max_resident(GiB)",
    ]  # fmt: skip
    expressions = [
        tag for category in read_layout().category for chart in category.chart for tag in chart.multiline.tag
    ]
    shown = [*map(page_tag, tags), "loss_metrics/validation_loss"]
    assert not any("(" in tag for tag in shown)  # the page would not draw it
    assert all(any(re.match(f"{e}$", tag) for e in expressions) for tag in shown)
    assert all(any(re.match(f"{e}$", tag) for tag in shown) for e in expressions)


def test_the_grid_of_ranks_as_a_table():
    table = rank_grid(Mesh(4, context=2, pipeline=2), [0, 0, 1, 1])
    assert table.splitlines() == [
        "rank | node | context | pipeline", "--- | --- | --- | ---",
        "0 | 0 | 0 | 0", "1 | 0 | 1 | 0", "2 | 1 | 0 | 1", "3 | 1 | 1 | 1",
    ]  # fmt: skip
    assert rank_grid(Mesh(512), [0] * 512).endswith("... and 256 more ranks")


def rank(compute: float) -> dict[str, float]:
    return {"compute": compute, "exposed_context": 0.1, "imbalance": max(0.0, 1.0 - compute), "other": 0.0}


def coloured(picture: np.ndarray, colour: tuple[int, int, int], row: slice) -> int:
    return int((picture[row] == np.array(colour)).all(-1).sum())


def test_a_straggler_has_the_longest_bar_of_its_own_work():
    picture = ranks_picture([rank(0.5), rank(1.0), rank(0.5)], [0, 0, 1], "step 3")
    top, height = (picture.shape[0] - 10) - 3 * 20, 20
    rows = [slice(top + height * n, top + height * n + 16) for n in range(3)]
    lengths = [coloured(picture, COLOURS["compute"], row) for row in rows]
    assert 1.9 < lengths[1] / lengths[0] < 2.1 and lengths[2] == lengths[0]
    assert coloured(picture, COLOURS["imbalance"], rows[0]) > 0 == coloured(picture, COLOURS["imbalance"], rows[1])


def test_a_straggler_among_many_is_the_reddest_cell():
    slow = [rank(1.0 if n == 77 else 0.5) for n in range(128)]
    picture = ranks_picture(slow, [n // 8 for n in range(128)], "step 3").astype(int)
    red = (picture[..., 0] - picture[..., 1] > 200).nonzero()
    side = 16
    assert len(red[0]) > 100
    assert (red[0].min() - 58) // side == 77 // 8 and (red[1].min() - 96) // side == 77 % 8


def test_axes_have_colours_of_their_own():
    parts = ["compute", *(f"exposed_{axis}" for axis in ("tensor", "context", "data", "pipeline", "model", "world"))]
    assert len(set(colours(parts).values())) == len(colours(parts))


def test_what_layers_report_has_charts_of_its_own():
    probes = [Metric("moe/load(%)", "mean", size=4), Metric("moe/dropped", "sum"), Metric("entropy", "mean")]
    z_loss, hidden = Metric("loss_metrics/z_loss", "mean"), Metric("tokens", "sum", shown=False)
    titles = {group.title: group for group in groups(False, [*probes, z_loss, hidden])}
    assert list(titles) == ["training", "moe", "entropy", "speed", "memory"]
    load, dropped = titles["moe"].charts
    assert [chart.title for chart in (load, dropped)] == ["load(%)", "dropped"]
    assert isinstance(load, Lines)
    assert all(re.fullmatch(load.tags[0], page_tag(tag)) for tag in probes[0].tags)
    assert [chart.title for chart in titles["training"].charts][:2] == ["loss", "z_loss"]
