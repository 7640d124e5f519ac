"""Every figure of a run's reports from numbers that are known: four ranks, an interval, a waterfall, a clock of the test's own."""

import io
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lsys.config.reports import LOSS, TOKENS, Z_LOSS, Slots, declared
from lsys.config.schema import Config
from lsys.observe import hardware, meter
from lsys.observe.efficiency import Record
from lsys.observe.meter import Interval, Meter
from lsys.observe.reporter import Reporter
from lsys.observe.values import Values
from lsys.observe.waterfall import Moved, Waterfall
from lsys.parallel.mesh import Mesh
from lsys.train.observers import Metering, Reporting, StepDone
from lsys.train.protocol import Losses

TOKENS_OF_A_STEP, STEPS = 8000, 50


def make(folder: Path) -> Config:
    return Config.model_validate(
        {
            "model": dict(layers=2, hidden=32, heads=4, ffn=64, vocab=64),
            "parallel": {"tensor": 2, "context": 2},
            "data": {"corpora": [{"path": "a"}]},
            "train": dict(
                folder=folder, steps=STEPS, batch_tokens=TOKENS_OF_A_STEP, micro_batch_tokens=1000, z_loss=1e-3
            ),
            "metrics": {"every": 5},
        }
    )


# Four ranks, 4 s a step: the first computes 3 s, the others 1.
PER_RANK = (
    {"compute": 3.0, "exposed_context": 0.5, "imbalance": 0.0, "data": 0.5},
    *({"compute": 1.0, "exposed_context": 0.5, "imbalance": 2.0, "data": 0.5},) * 3,
)
PARTS = {"compute": 1.5, "exposed_context": 0.5, "imbalance": 1.5, "data": 0.5}
FALL = Waterfall(5, 4.0, PARTS, PER_RANK, {"context": Moved(3e6, 0.75, 0.5), "tensor": Moved(0.0, 0.25, 0.0)})
# Five steps in 20 s, a fifth of the time waiting for data; 2.4e12 model FLOP/s of all ranks.
INTERVAL = Interval(steps=5, seconds=20.0, data_seconds=4.0, tokens=40_000, flops=48e12)
# Of all ranks 8e12 FLOP/s at the peak; a rank of the baseline did 1e12.
EFFICIENCY: Any = SimpleNamespace(percent=lambda flops: 100 * flops / 1e12)
EXPECTED = {
    "throughput(tps)": 500.0,  # 40,000 tokens / 20 s / 4 ranks
    "tflops": 0.6,  # 2.4 / 4
    "mfu(%)": 30.0,  # 2.4 of 8
    "scaling/efficiency(%)": 60.0,  # 0.6 of 1
    "time_metrics/end_to_end(s)": 4.0,
    "time_metrics/data_loading(%)": 20.0,
    "memory/max_resident(GiB)": 3.0,
    "waterfall/compute(%)": 37.5,
    "waterfall/exposed_context(%)": 12.5,
    "waterfall/imbalance(%)": 37.5,
    "waterfall/data(%)": 12.5,
    "comm/context/bytes": 3e6,
    "comm/context/total(ms)": 750.0,
    "comm/context/exposed(ms)": 500.0,
    "comm/tensor/bytes": 0.0,
    "comm/tensor/total(ms)": 250.0,
    "comm/tensor/exposed(ms)": 0.0,
    "ranks/compute_min(ms)": 1000.0,
    "ranks/compute_mean(ms)": 1500.0,
    "ranks/compute_max(ms)": 3000.0,
    "ranks/slowest": 0.0,
}
STEPS_OWN = {LOSS: 1.25, Z_LOSS: 0.0625, "grad_norm": 0.75, "lr": 2.5e-4, "n_tokens_seen": 10 * TOKENS_OF_A_STEP}
LINE = (
    "step 10/50 | loss 1.2500 | 2,000 tokens/s | mfu 30.0% | memory 3.00 GiB | grad norm 0.75 | lr 2.50e-04 | ETA 0:02:40"
    " | efficiency 60.0% | compute 38% exposed 12% imbalance 38% data 12%"
)


@pytest.fixture
def reporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reporter:
    """The first of four ranks on two nodes, of a process that has had 3 GiB; the console writes into `console.file`."""
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)  # KiB
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    made = Reporter(
        make(tmp_path), active=True, mesh=Mesh(4, tensor=2, context=2), nodes=(0, 0, 1, 1), device=torch.device("cpu"),
        peak=8e12, efficiency=EFFICIENCY, first_step=1, text="", corpora=[],
    )  # fmt: skip
    made.console = Console(file=io.StringIO(), highlight=False, soft_wrap=True)
    return made


def curves(folder: Path, step: int) -> dict[str, float]:
    """The points of a step, as TensorBoard reads them."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    points = {tag: {p.step: p.value for p in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    return {tag: found[step] for tag, found in points.items() if step in found}


def printed(reporter: Reporter) -> list[str]:
    file: Any = reporter.console.file
    return [line for line in file.getvalue().splitlines() if line]


def test_every_curve_and_the_console_s_line(reporter: Reporter, tmp_path: Path) -> None:
    reporter.training(10, INTERVAL, STEPS_OWN, FALL)
    reporter.validation(10, 1.5, 1.75, {LOSS: 1.5, Z_LOSS: 0.125})
    reporter.close()
    validation = {"loss_metrics/validation_loss": 1.5, f"validation/{Z_LOSS}": 0.125}
    assert curves(tmp_path, 10) == pytest.approx(EXPECTED | STEPS_OWN | validation, rel=1e-6)  # events are fp32
    told = "step 10 | validation loss 1.5000 nats per token (bigram entropy of the corpus: 1.7500)"
    assert printed(reporter) == [LINE, told]


def test_what_a_run_achieved_is_its_ranks_each(reporter: Reporter, tmp_path: Path) -> None:
    for _ in range(2):
        reporter.training(10, INTERVAL, STEPS_OWN, FALL)
    reporter.close()
    record = Record.load(tmp_path / "scaling.json")
    assert (record.ranks, record.step_seconds, record.flops) == (4, 4.0, pytest.approx(0.6e12))
    assert record.waterfall == PARTS and record.work.tokens == TOKENS_OF_A_STEP


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.perf_counter", made)
    return made


def test_pauses_are_no_part_of_steps(clock: Clock) -> None:
    """Data and a report cost the steps; a validation and a checkpoint do not. Nothing of it goes into the next interval."""
    found = Meter()
    metering = Metering(found, 300)
    for _ in range(2):
        for what, seconds in (("data", 1.0), ("validation", 64.0), ("checkpoint", 32.0), ("report", 2.0)):
            with metering.paused(what):
                clock.passes(seconds)
        clock.passes(5.0)
        metering.end_step(SimpleNamespace(flops=7e9))  # type: ignore[arg-type]
    assert found.take() == Interval(steps=2, seconds=16.0, data_seconds=2.0, tokens=600, flops=14e9)
    clock.passes(4.0)
    metering.end_step(SimpleNamespace(flops=1e9))  # type: ignore[arg-type]
    next_one = found.take()
    assert next_one == Interval(steps=1, seconds=4.0, data_seconds=0.0, tokens=300, flops=1e9)
    assert (next_one.tokens_per_second, next_one.step_seconds, next_one.data_percent) == (75.0, 4.0, 0.0)


def test_the_loop_reports_what_its_steps_gave(clock: Clock, reporter: Reporter, tmp_path: Path) -> None:
    """Two intervals of five steps: of all replicas' FLOPs, the newest losses, norm and rate, tokens since the run's beginning."""
    settings, slots = reporter.settings, Slots(declared(reporter.settings))
    position = SimpleNamespace(tokens_seen=lambda step: step * settings.train.batch_tokens)
    data = SimpleNamespace(flops_of_all=lambda own: 2 * own, position=position)  # the other replica has done as much
    observers = SimpleNamespace(paused=lambda what: mock.MagicMock())
    run: Any = SimpleNamespace(settings=settings, data=data, observers=observers, updates=SimpleNamespace(skipped=3))
    reporting = Reporting(run, reporter, found := Meter(), SimpleNamespace(take=lambda: None))  # type: ignore[arg-type]
    metering = Metering(found, settings.train.batch_tokens)
    for step in range(1, 11):
        sums = [0.0] * slots.messages[0].numel
        for name, total in ((LOSS, 4000.0 / step), (Z_LOSS, 400.0 / step), (TOKENS, 1000.0)):
            sums[slots.sums[name]] = [total]
        clock.passes(4.0)
        done = StepDone(step, Losses.of(Values(slots, 1, sums, [])), 1.0 / step, 1e-3 * step, 4.8e12)
        metering.end_step(done)
        reporting.end_step(done)
    reporting.close(False)
    for step in (5, 10):
        known = {
            LOSS: 4.0 / step, Z_LOSS: 0.4 / step, "grad_norm": 1 / step, "lr": 1e-3 * step, "throughput(tps)": 500.0,
            "n_tokens_seen": step * TOKENS_OF_A_STEP, "train/skipped_steps": 3, "tflops": 0.6, "mfu(%)": 30.0, "scaling/efficiency(%)": 60.0,
            "time_metrics/end_to_end(s)": 4.0, "time_metrics/data_loading(%)": 0.0, "memory/max_resident(GiB)": 3.0,
        }  # fmt: skip
        assert curves(tmp_path, step) == pytest.approx(known, rel=1e-6)
    assert [line.split(" | ")[:2] for line in printed(reporter)] == [
        ["step  5/50", "loss 0.8000"],
        ["step 10/50", "loss 0.4000"],
    ]


def test_memory_of_a_gpu_is_the_most_since_the_last_report(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**29)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("reset"))
    assert meter.memory(torch.device("cuda")) == ("max_reserved", 2.5) and asked == ["reset"]


def test_a_processor_s_peak_is_the_quickest_product_s(clock: Clock) -> None:
    """Products of 64 x 64 that take 4, 1 and 2 s: two FLOPs for each of 64^3 pairs in the quickest."""
    took = iter([9.0, 4.0, 1.0, 2.0])  # the first sets up

    class Timed(torch.Tensor):
        def __matmul__(self, other: Any) -> Any:
            clock.passes(next(took))

    x = torch.zeros(64, 64).as_subclass(Timed)
    with mock.patch.object(torch, "randn", lambda *size: mock.Mock(to=lambda dtype: x)):
        assert hardware.cpu_peak(torch.float32, size=64, seconds=6.5) == 2 * 64**3 / 1.0
