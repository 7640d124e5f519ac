"""The points of a sweep, what starts them, and a sweep of two points."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from lsys.bench import scaling, scaling_report
from lsys.bench.scaling import Point, ScalingError, ScalingOptions, points
from lsys.config.load import load
from lsys.config.messages import ConfigError
from lsys.config.overrides import Override
from lsys.config.rules import check
from lsys.observe import rank_heatmap, stack

LARGE = Path(__file__).parents[2] / "configs" / "hybrid_7b_256k.yaml"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def changed(point: Point) -> dict[str, str]:
    return {".".join(names): str(text) for names, text in point.overrides}


def test_weak_scaling_over_context_makes_the_micro_batch_longer():
    config = load(QUICKSTART)
    first, second = points(config, ScalingOptions(QUICKSTART, ranks="1,4", axis="context"))
    assert changed(first)["parallel.context"] == str(config.parallel.context)
    assert changed(second)["parallel.context"] == str(4 * config.parallel.context)
    assert changed(second)["train.micro_batch_tokens"] == str(4 * config.train.micro_batch_tokens)
    assert changed(second)["train.batch_tokens"] == str(4 * config.train.batch_tokens)


def test_the_schedule_of_a_long_run_does_not_stand_in_the_way():
    """Its decay may be longer than a point has steps."""
    config = load(LARGE)
    assert config.optimizer.decay_steps
    (point, *_) = scaling.points(config, ScalingOptions(LARGE, ranks="512", nodes="64"))
    assert load(LARGE, point.overrides, lambda each: check(each, 512)).optimizer.decay_steps is None


def test_warm_up_ends_within_the_steps_of_a_point():
    config = load(QUICKSTART, [Override(("optimizer", "warmup_steps"), "4")])
    for steps, warm_up in ((12, "4"), (3, "2")):
        (point,) = points(config, ScalingOptions(QUICKSTART, ranks="1", steps=steps))
        assert changed(point)["optimizer.warmup_steps"] == warm_up


def test_strong_scaling_leaves_the_step_as_it_is():
    config = load(QUICKSTART)
    _, second = points(config, ScalingOptions(QUICKSTART, ranks="1,2", axis="data", scaling="strong"))
    assert not {"train.batch_tokens", "train.micro_batch_tokens", "parallel.context"} & changed(second).keys()


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(ranks="1,x"), "no list of numbers"),
        (dict(ranks="2,1"), "does not ascend"),
        (dict(ranks="2,3"), "no multiple"),
        (dict(ranks="0,2"), "below 1"),
        (dict(ranks="1,2,4", nodes="1,2"), "--nodes names 2 points"),
        (dict(ranks="1,3", nodes="1,2"), "3 ranks do not divide over 2 nodes"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ScalingError, match=said):
        points(load(QUICKSTART), ScalingOptions(QUICKSTART, **options))


def test_a_sweep_with_a_point_that_cannot_run_is_refused_before_the_first(tmp_path):
    options = ScalingOptions(QUICKSTART, ranks="1,2", axis="pipeline", out=tmp_path / "out")
    three = Override(("model", "layers"), "3")
    with pytest.raises(ConfigError, match="layers"):
        scaling.main(options, [three])
    assert not options.out.exists()
    with pytest.raises(ScalingError, match="--rate .* --launcher"):
        scaling.main(ScalingOptions(QUICKSTART, ranks="2", nodes="2", out=options.out), [])


def test_a_launcher_gets_the_numbers():
    options = ScalingOptions(QUICKSTART, launcher="srun -N {nodes} run.sh {ranks_per_node}")
    point = Point(16, 2, (Override(("train", "steps"), "3"),))
    assert scaling.launcher(options, point) == ["srun", "-N", "2", "run.sh", "8"]
    assert scaling.program(options, [], point)[-2:] == ["--train.steps", "3"]
    assert scaling.launcher(ScalingOptions(QUICKSTART), point)[1:] == [
        "--standalone", "--nproc-per-node", "16", "-m", "lsys.launch.worker"
    ]  # fmt: skip


def test_the_picture_of_a_sweep_shows_all_of_it_in_the_colours_of_a_run(tmp_path):
    def point(ranks, efficiency, **waterfall):
        measured = {"waterfall": waterfall, "step_seconds": 1.0}
        return dict(ranks=ranks, nodes=1, shares_cores=False, measured=measured, efficiency={"measured": efficiency})

    summary: dict[str, Any] = {
        "options": {"scaling": "weak", "axis": "data"},
        "points": [point(1, 1.0, compute=3.0, other=1.0), point(2, 1.36, compute=1.0, bubble=0.0, exposed_data=1.0)],
    }
    plots: list[Any] = stack.canvas(8, 4, plots=2)[1]
    left, right = plots
    scaling_report._efficiency(left, summary)
    assert left.get_ylim()[1] == pytest.approx(1.1 * 136)
    assert left.get_xlabel() == "ranks" and left.get_ylabel() == "FLOP/s of a rank, % of the first point's"
    scaling_report._waterfalls(right, summary["points"])
    pieces = [(bar.get_x(), bar.get_y(), bar.get_height(), to_hex(bar.get_facecolor())) for bar in right.patches]
    assert [(y, height, paint) for x, y, height, paint in pieces if x > 0 and height] == [
        (0, 50, rank_heatmap.colour("compute")), (50, 50, rank_heatmap.colour("exposed_data"))
    ]  # fmt: skip
    assert [(y, height) for x, y, height, _ in pieces if x < 0 and height] == [(0, 75), (75, 25)]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["other", "exposed_data", "compute"]
    drawn = scaling_report.draw(summary, tmp_path / "scaling.png")
    assert drawn.shape == (450, 1200, 3) and (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_sweep_leaves_figures_curves_and_a_picture(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    from lsys.data.prepare import PrepareArgs, prepare

    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} " * 600)
    prepare(PrepareArgs(sources=[str(tmp_path / "text")], out=corpus))
    small = {
        "model.layers": 2, "model.pattern": "LS", "model.hidden": 32, "model.heads": 4, "model.groups": 2, "model.head_dim": 8,
        "model.ffn": 64, "data.corpora.0.path": corpus, "train.batch_tokens": 512, "train.micro_batch_tokens": 256,
        "data.validation_fraction": 0,
    }  # fmt: skip
    overrides = [Override(tuple(key.split(".")), str(value)) for key, value in small.items()]
    options = ScalingOptions(QUICKSTART, ranks="1,2", steps=6, out=tmp_path / "out")
    assert scaling.main(options, overrides) == 0
    summary = json.loads((options.out / "scaling.json").read_text())
    first, second = summary["points"]
    assert first["efficiency"] == {"measured": 1.0, "replay": 1.0}
    measured = second["measured"]
    assert second["efficiency"]["measured"] == measured["flops"] / first["measured"]["flops"]
    assert measured["ranks"] == 2 and measured["work"]["tokens"] == 1024
    assert measured["waterfall"]["compute"] > 0
    assert (options.out / "scaling.png").stat().st_size > 10_000 and list((options.out / "tensorboard").glob("events*"))
    assert "weak scaling over context" in capsys.readouterr().out
    with pytest.raises(ScalingError, match="not empty"):
        scaling.main(options, overrides)
