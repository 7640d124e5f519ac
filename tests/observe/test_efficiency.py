"""Efficiency is what a rank does now over what it did in the baseline; other work and other hardware are refused."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lsys.config.schema import Config
from lsys.observe.efficiency import BaselineError, Efficiency, History, Record, hardware_name
from lsys.observe.meter import Interval
from lsys.observe.reporter import Reporter
from lsys.observe.run_dir import FolderError, mark_folder, require_own_folder


def make(folder: Path = Path("out"), tokens: int = 4096, **model: Any) -> Config:
    return Config.model_validate(
        {
            "model": dict(layers=2, hidden=32, heads=4, ffn=64, vocab=64, **model),
            "data": {"corpora": [{"path": "a"}]},
            "train": dict(folder=folder, steps=10, batch_tokens=tokens, micro_batch_tokens=1024),
        }
    )


def baseline(path: Path, ranks: int = 2, **changes: Any) -> Path:
    history = History()
    history.add(9.0, 1.0)  # the first, in which things are set up
    for seconds in (0.5, 0.4, 0.6):
        history.add(seconds, 100 / seconds, {"compute": 0.8 * seconds, "other": 0.2 * seconds})
    record = history.record(make(), ranks, "a processor")
    assert record is not None
    dataclasses.replace(record, **changes).save(path)
    return path


def test_a_record_is_the_median_of_the_reports_but_the_first(tmp_path):
    record = Record.load(baseline(tmp_path / "scaling.json"))
    assert record.step_seconds == 0.5 and record.flops == 200
    assert record.waterfall == pytest.approx({"compute": 0.4, "other": 0.1})
    assert record.versions["torch"] == torch.__version__


def test_the_waterfall_is_of_the_reports_that_have_one():
    def record(*falls: dict[str, float] | None) -> Record:
        history = History()
        for number, fall in enumerate(falls):
            history.add(1.0 + number, 1.0, fall)
        found = history.record(make(), 1, "a processor")
        assert found is not None
        return found

    first = {"compute": 9.0, "core": 9.0}
    found = record(first, {"compute": 3.0}, None, {"compute": 1.0, "data": 0.5}, None, {"compute": 2.0}, None, None)
    assert found.waterfall == {"compute": 2.0, "data": 0.0} and found.step_seconds == 5.0
    assert record(first, None, {"compute": 3.0, "other": 1.0}, {"compute": 4.0}, None).waterfall == {
        "compute": 3.5,
        "other": 0.5,
    }
    assert record(first, None, None).waterfall == {} and record(first).waterfall == first
    assert History().record(make(), 1, "a processor") is None


def test_a_long_run_keeps_its_latest_reports():
    history = History()
    for number in range(10_002):
        history.add(float(number), 1.0)
    found = history.record(make(), 1, "a processor")
    assert found is not None and found.step_seconds == 5001.5  # 2 .. 10,001
    assert len(history._others) == 10_000


def test_only_the_rank_that_writes_keeps_reports():
    mesh: Any = SimpleNamespace(world_size=2)
    for active in (True, False):
        reporter = Reporter(
            make(), active=False, mesh=mesh, nodes=(0, 0), device=torch.device("cpu"), peak=None, efficiency=None,
            first_step=1, text="", corpora=(),
        )  # fmt: skip
        reporter.active = active
        values = {"loss_metrics/global_avg_loss": 1.0, "grad_norm": 1.0, "lr": 0.1}
        reporter.training(1, Interval(1, 1.0, 0.0, 1, 1.0), values)
        assert (reporter.history.record(make(), 2, "a processor") is not None) == active


@pytest.mark.parametrize("tokens, ranks, kind", [(4096, 2, "weak"), (8192, 4, "weak"), (4096, 4, "strong")])
def test_weak_and_strong_scaling(tmp_path, tokens, ranks, kind):
    efficiency = Efficiency(baseline(tmp_path / "b.json"), make(tokens=tokens), ranks, "a processor")
    assert efficiency.kind == kind and efficiency.percent(150) == 75


@pytest.mark.parametrize(
    "config, hardware, said",
    [
        (make(tokens=5120), "a processor", ["train.batch_tokens is 5,120 on 4 ranks", "take 8,192", "4,096"]),
        (make(tokens=8192, pattern="S"), "a processor", ["model.pattern is 'SS', in the baseline 'LL'"]),
        (make(tokens=8192), "another", ["measured on 'a processor', this is 'another'"]),
    ],
)
def test_other_work_and_hardware_are_refused_with_the_difference(tmp_path, config, hardware, said):
    path = baseline(tmp_path / "b.json")
    with pytest.raises(BaselineError) as error:
        Efficiency(path, config, 4, hardware)
    assert all(words in str(error.value) for words in [str(path), *said])


def test_a_baseline_of_another_version_s_model_is_refused(tmp_path):
    path = baseline(tmp_path / "b.json")
    tree = json.loads(path.read_text())
    tree["work"]["model"]["unheard_of"] = 3
    path.write_text(json.dumps(tree))
    with pytest.raises(
        BaselineError, match="the baseline's model is none that this lsys knows: unheard_of: unknown key"
    ):
        Efficiency(path, make(tokens=8192), 4, "a processor")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "work": 3}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "b.json"
    with pytest.raises(BaselineError, match="does not exist"):
        Record.load(path)
    path.write_text(text)
    with pytest.raises(BaselineError, match=str(path)):
        Record.load(path)


def test_hardware_has_a_name():
    assert hardware_name(torch.device("cpu"))


def test_a_folder_keeps_the_curves_of_one_run(tmp_path):
    first, other = make(tmp_path), make(tmp_path, tokens=8192)
    require_own_folder(first)
    mark_folder(first)
    require_own_folder(first)  # the same run, started again
    with pytest.raises(FolderError, match="another run"):
        require_own_folder(other)
    require_own_folder(other, goes_on=True)  # from a checkpoint of the folder
    with pytest.raises(FolderError, match="or checkpoint.resume scratch, which sets the curves aside"):
        require_own_folder(other, goes_on=False)
