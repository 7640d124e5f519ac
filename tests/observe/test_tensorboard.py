"""What TensorBoard is told, read back by its own library: one run with curves, pictures, hyperparameters and texts."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from lsys.config.reports import Metric
from lsys.config.schema import Config
from lsys.data.corpus import Corpus
from lsys.observe import reporter as reports
from lsys.observe.efficiency import Record
from lsys.observe.meter import Interval
from lsys.observe.rank_heatmap import COLOURS, colour, ranks_picture
from lsys.observe.reporter import Reporter
from lsys.observe.stack import shown
from lsys.observe.tensorboard import PICTURE, Board, address, charts, hyperparameters
from lsys.observe.texts import corpora_table, rank_grid
from lsys.observe.waterfall import Moved, Waterfall, part_names
from lsys.parallel.ledger.labels import OTHER, WORLD
from lsys.parallel.mesh import AXES, Mesh
from lsys.runtime.groups import AXES as GROUPS

ROOT = Path(__file__).parents[2]
MODEL: dict[str, Any] = dict(layers=2, hidden=32, heads=4, ffn=64, vocab=64)


def make(folder: Path, **sections: dict[str, Any]) -> Config:
    train = dict(folder=folder, steps=100, batch_tokens=4096, micro_batch_tokens=1024) | sections.pop("train", {})
    data = {"corpora": [{"path": "a"}]}
    return Config.model_validate({"model": MODEL, "data": data, "train": train, **sections})


def fall(**percent: float) -> Waterfall:
    """A step of one second on two ranks."""
    parts = {part: share / 100 for part, share in percent.items()}
    return Waterfall(1, 1.0, parts, (parts, parts), {"context": Moved(1e6, 0.3, 0.2)})


def reporting(folder: Path, first_step: int = 1, **sections: dict[str, Any]) -> Reporter:
    """The reporter of two ranks' run, as the loop opens it."""
    return Reporter(
        make(folder, **sections), active=True, mesh=Mesh(2, context=2), nodes=(0, 0), device=torch.device("cpu"), peak=1e9,
        efficiency=None, first_step=first_step, text="model: the resolved one", corpora=[(CORPUS, 1.0)],
    )  # fmt: skip


def report(reporter: Reporter, steps: range, **percent: float) -> None:
    values = {"loss_metrics/global_avg_loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "n_tokens_seen": 1.0}
    for step in steps:
        reporter.training(step, Interval(1, 1.0, 0.0, 1, 1.0), values, fall(**percent))
        reporter.validation(step, 1.0, None)


def lengths(*numbers: int) -> Any:
    return np.array(numbers)


SIDECAR = {"tokenizer": {"spec": "bytes"}, "sha256": {".bin": "1d5a"}}
CORPUS = Corpus("data/a|b", lengths(1000, 234), lengths(0, 1000), lengths(), SIDECAR)


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def picture(events: EventAccumulator, tag: str = PICTURE) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))


def plot_and_legend(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is within the axes of a picture of the waterfall, and right of them: their frame is the only long black line."""
    black = (drawn < 40).all(-1)
    rows, columns = np.flatnonzero(black.sum(1) > 200), np.flatnonzero(black.sum(0) > 200)
    return drawn[rows[0] + 2 : rows[-1] - 1, columns[0] + 2 : columns[-1] - 1], drawn[:, columns[-1] + 2 :]


def shares(column: np.ndarray) -> dict[str, float]:
    """%, of each part whose colour a column of pixels has."""
    names: dict[tuple[int, ...], str] = {rgb: part for part, rgb in COLOURS.items()}
    counts = Counter(names.get(tuple(int(c) for c in pixel), "border") for pixel in column)
    return {part: 100 * count / len(column) for part, count in counts.items() if part != "border"}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that had gone to 60 before, 60% and then 20% of them computing."""
    folder = tmp_path_factory.mktemp("run")
    report(first := reporting(folder), range(1, 61), compute=60.0, exposed_context=40.0)
    first.close()
    report(second := reporting(folder, first_step=31), range(31, 41), compute=20.0, exposed_data=50.0, imbalance=30.0)
    second.close()
    return folder


# ---- one run


def test_a_run_is_one_run_of_tensorboard_with_no_curve_twice(resumed: Path) -> None:
    assert {path.parent for path in resumed.rglob("*tfevents*")} == {resumed / "tensorboard"}
    events = read(resumed)
    curves = {
        tag: tuple((point.step, point.value) for point in events.Scalars(tag)) for tag in events.Tags()["scalars"]
    }
    plain = [re.sub(r"\W+", " ", tag).strip() for tag in curves]
    assert len(set(plain)) == len(plain) > 20, sorted(plain)  # such as `mfu(%)` and `mfu %`
    assert {tag for tag in curves if tag.startswith("waterfall/")} == {
        f"waterfall/{part}(%)" for part in ("compute", "exposed_context", "exposed_data", "imbalance")
    }
    assert {step for step, _ in curves["loss_metrics/global_avg_loss"]} == set(range(1, 41))
    points = Counter(
        (event.step, value.tag)
        for path in resumed.rglob("*tfevents*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag in curves and event.step <= 30
    )
    assert set(points.values()) == {1}


def test_no_curve_says_what_another_says(tmp_path: Path) -> None:
    """Of a run in which everything varies, with every axis and part."""
    draw = random.Random(0).random
    names = part_names(["tensor", "context", "pipeline", "data"], ranks=2, stages=2, cores=True)
    reporter = reporting(tmp_path)
    for step in range(1, 9):
        ranks = tuple({name: draw() for name in names} for _ in range(2))
        means = {name: sum(rank[name] for rank in ranks) / 2 for name in names}
        moved = {axis: Moved(1e6 * draw(), draw(), draw()) for axis in ("tensor", "context", "pipeline", "data")}
        values = {tag: draw() for tag in ("loss_metrics/global_avg_loss", "grad_norm", "lr", "n_tokens_seen")}
        interval = Interval(1, draw() + 0.1, draw(), round(1e6 * draw()), 1e9 * draw())
        reporter.training(step, interval, values, Waterfall(1, sum(means.values()), means, ranks, moved))
        reporter.validation(step, draw(), None)
    reporter.close()
    events = read(tmp_path)
    curves: dict[str, tuple[float, ...]] = {}
    for tag in events.Tags()["scalars"]:
        if tag != "ranks/slowest" and not tag.startswith("memory/"):
            points = np.array([point.value for point in events.Scalars(tag)])
            curves[tag] = tuple(np.round(points / points[0], 5).tolist())  # in whatever unit
    alike = [pair for pair in itertools.combinations(curves, 2) if curves[pair[0]] == curves[pair[1]]]
    assert len(curves) > 30 and alike == [("tflops", "mfu(%)")]  # both names are torchtitan's


def test_a_run_says_the_address_that_the_docs_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporting(tmp_path).close()
    said = capsys.readouterr().out
    assert f"curves: tensorboard --logdir {tmp_path}, then {address()}\n" in said
    assert f"\n{address()}\n" in (ROOT / "docs" / "monitoring.md").read_text()


def test_the_picture_has_the_whole_history_also_after_resuming(resumed: Path) -> None:
    inside, _ = plot_and_legend(picture(read(resumed)))
    width = inside.shape[1]
    before, after = (
        shares(inside[:, round(0.74 * width)]),
        shares(inside[:, round(0.76 * width)]),
    )  # of 40 steps, 30 and 10
    assert before == pytest.approx(dict(compute=60, exposed_context=40), abs=1.5)
    assert after == pytest.approx(dict(compute=20, exposed_data=50, imbalance=30), abs=1.5)
    assert shares(inside[:, 3]) == pytest.approx(before, abs=1)
    assert read(resumed).Images(PICTURE)[-1].step == 40


def test_a_picture_has_a_legend_of_the_parts_that_it_shows(resumed: Path) -> None:
    _, legend = plot_and_legend(picture(read(resumed)))
    found = {part for part, rgb in COLOURS.items() if (legend == np.array(rgb)).all(-1).sum() > 50}
    assert found == {"compute", "exposed_context", "exposed_data", "imbalance"}


def test_parts_come_in_one_order_and_what_cannot_be_seen_is_left_out() -> None:
    found = {"other": [1.0], "data": [0.05], "compute": [0.0, 98.0], "exposed_zone": [0.1], "imbalance": [0.9]}
    assert shown(found) == ["compute", "imbalance", "other", "exposed_zone"]


def test_a_run_that_adds_nothing_draws_nothing(resumed: Path, tmp_path: Path) -> None:
    import shutil

    again = Path(shutil.copytree(resumed, tmp_path / "again"))
    number = len(read(again).Images(PICTURE))
    reporting(again, first_step=41).close()
    assert len(read(again).Images(PICTURE)) == number


# ---- when


def test_no_picture_is_drawn_before_it_is_due(tmp_path: Path) -> None:
    report(reporter := reporting(tmp_path), range(1, 20), compute=100.0)
    assert reporter.board is not None
    assert PICTURE not in read(tmp_path).Tags()["images"]
    reporter.board.pace.last -= 1000
    report(reporter, range(20, 30), compute=100.0)
    assert [image.step for image in read(tmp_path).Images(PICTURE)] == [20]


# ---- what fails is tried again


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


KINDS = [
    (reports.OPENING, Board, "__init__"),
    (reports.CURVES, Board, "flush"),
    (reports.RANKS, Board, "draw_ranks"),
    (reports.PICTURE, Board, "draw"),
    (reports.WRITING, Record, "save"),
]


@pytest.mark.fault("full TensorBoard disk")
@pytest.mark.parametrize("is_freed", [False, True])
@pytest.mark.parametrize("what, owner, method", KINDS)
def test_what_cannot_be_written_is_told_once_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    what: str, owner: type, method: str, is_freed: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(reports, "PAUSE", 0.0)
    with monkeypatch.context() as disk:
        disk.setattr(owner, method, full)
        report(reporter := reporting(tmp_path), range(1, 4), compute=100.0)
        if not is_freed:
            reporter.close()
    if is_freed:
        report(reporter, range(4, 6), compute=100.0)
        reporter.close()
    said = capsys.readouterr().out
    told = (
        f"warning: {what} failed: OSError: [Errno 28] No space left on device; training goes on, and it is tried again"
    )
    assert said.count(told) == (0 if what == reports.WRITING and is_freed else 1)
    assert said.count("| loss 1.0000 |") == (5 if is_freed else 3)
    assert (f"could not be written: {what}: OSError" in said) == (not is_freed)
    assert (tmp_path / "scaling.json").exists() == (owner is Board or is_freed)
    if (
        what not in (reports.OPENING, reports.CURVES) or is_freed
    ):  # what else there is was written; and of what waited, everything
        events = read(tmp_path)
        kept = set(range(4 if what == reports.OPENING else 1, 6 if is_freed else 4))
        for tag in ("loss_metrics/global_avg_loss", "loss_metrics/validation_loss"):
            assert {point.step for point in events.Scalars(tag)} == kept
        assert (PICTURE in events.Tags()["images"]) == (what != reports.PICTURE or is_freed)
    if what == reports.OPENING and is_freed:  # three reports and three validations
        assert f"could not be written: 6 {reports.UNSHOWN}" in said


# ---- what differs


def test_hyperparameters_are_degrees_and_what_is_not_the_default_s(tmp_path: Path) -> None:
    plain = hyperparameters(make(tmp_path), 2)
    assert set(plain) == {
        "ranks", "parallel.tensor", "parallel.pipeline", "parallel.context", "parallel.attention", "parallel.linear",
        "data.corpora", *(f"model.{key}" for key in MODEL), "train.steps", "train.batch_tokens", "train.micro_batch_tokens",
    }  # fmt: skip
    assert (plain["ranks"], plain["parallel.context"], plain["parallel.attention"]) == (2, 1, "auto")
    changed = make(
        tmp_path,
        model={**MODEL, "pattern": "LS", "mixers": {"lightning": {"lrpe": "all"}}},
        optimizer={"beta1": 0.9, "beta2": 0.9, "lr": 1e-3},
        train={"seed": 7, "precision": "bf16", "profile": {"first": 3}},  # the precision is the default's
    )
    more = {key: value for key, value in hyperparameters(changed, 2).items() if plain.get(key) != value}
    assert more == {
        "optimizer.lr": 1e-3, "optimizer.beta2": 0.9, "train.seed": 7, "train.profile.first": 3, "model.pattern": "LS",
        "model.mixers.lightning.lrpe": "all",
    }  # fmt: skip


def test_tensorboard_reads_the_hyperparameters(resumed: Path) -> None:
    events = read(resumed)
    (started,) = [
        parse_session_start_info_plugin_data(content)
        for tag, content in events.PluginTagToContent("hparams").items()
        if tag == SESSION_START_INFO_TAG
    ]
    config = make(resumed)
    assert {key: value.number_value for key, value in started.hparams.items() if key in ("ranks", "train.steps")} == {
        "ranks": 2.0, "train.steps": 100.0
    }  # fmt: skip
    assert set(started.hparams) == set(hyperparameters(config, 2))


# ---- texts


def test_versions_corpora_configuration_and_ranks_are_texts(resumed: Path) -> None:
    events = read(resumed)
    texts = {
        tag.removesuffix("/text_summary"): events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }
    assert set(texts) == {"config", "ranks", "versions", "corpora"}
    assert f"torch | {torch.__version__}" in texts["versions"]
    assert all(f"\n{name} | " in texts["versions"] for name in ("lsys", "megatron-core", "commit", "host", "command"))
    assert texts["corpora"].splitlines()[-1] == r"data/a\|b | 1 | 1,234 | 2 | bytes | 1d5a"
    assert "the resolved one" in texts["config"] and "rank | node | context" in texts["ranks"]


def test_a_corpus_of_other_tools_is_told_as_far_as_it_is_known() -> None:
    bare = Corpus("b", lengths(5), lengths(0), lengths())
    assert corpora_table([(bare, 0.25)]).splitlines()[-1] == "b | 0.25 | 5 | 1 | unknown | unknown"


# ---- charts of several lines


def test_charts_of_several_lines_match_what_they_are_for(resumed: Path) -> None:
    events = read(resumed)
    proto = events.Tensors(CONFIG_SUMMARY_TAG)[-1].tensor_proto
    page = layout_pb2.Layout.FromString(proto.string_val[0])
    drawn = {
        chart.title: [tag for tag in events.Tags()["scalars"] if re.match(f"{chart.multiline.tag[0]}$", tag)]
        for category in page.category
        for chart in category.chart
    }
    assert drawn == {
        "loss": ["loss_metrics/global_avg_loss", "loss_metrics/validation_loss"],
        "bytes that a rank sends in a step": ["comm/context/bytes"],
    }


def test_a_vector_that_layers_report_is_one_chart() -> None:
    load, unit = Metric("moe/load.8", "mean", size=4), Metric("moe/load(%)", "mean", size=4)
    hidden, scalar = Metric("moe/tokens", "sum", size=4, shown=False), Metric("moe/dropped", "sum")
    (chart,) = charts([load, unit, hidden, scalar])[2:]
    assert (chart.group, chart.title) == ("moe", "load.8")
    assert all(re.fullmatch(chart.tag, tag) for tag in load.tags)
    assert not any(re.fullmatch(chart.tag, tag) for tag in (*unit.tags, *scalar.tags, "moe/loadx8/0"))


# ---- ranks


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
    assert top < 100  # a title and a legend, no more
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


def test_ranks_without_work_have_a_picture_too() -> None:
    with np.errstate(all="raise"):
        assert ranks_picture([rank(0.0)] * 128, [n // 8 for n in range(128)], "step 3").std() > 0


def test_every_axis_and_part_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert {f"exposed_{axis}" for axis in (*AXES, *GROUPS.values(), WORLD, OTHER)} <= set(COLOURS)
    assert colour("compute") == "#2e7d32" and colour("exposed_of_a_new_axis") == colour("exposed_other")
