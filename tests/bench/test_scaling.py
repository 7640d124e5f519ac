"""The points of a sweep, what starts them, and a sweep of two points."""

import json
from pathlib import Path

import pytest

from lsys.bench import scaling
from lsys.bench.scaling import Point, ScalingError, ScalingOptions, points
from lsys.config.load import load
from lsys.config.messages import ConfigError
from lsys.config.overrides import Override
from lsys.config.rules import check

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


@pytest.mark.slow
def test_a_sweep_leaves_figures_curves_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
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
