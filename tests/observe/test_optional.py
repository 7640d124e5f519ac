"""What training can do without fails without harm: said once for each reason, tried again, and summed up at the end."""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lsys.config.schema import Config
from lsys.observe.efficiency import History, Record
from lsys.observe.meter import Interval
from lsys.observe.optional import Attempts, say
from lsys.observe.reporter import Reporter
from lsys.parallel.mesh import Mesh


def make(folder: Path) -> Config:
    train = dict(folder=folder, steps=10, batch_tokens=4096, micro_batch_tokens=1024)
    model = dict(layers=2, hidden=32, heads=4, ffn=64, vocab=64)
    metrics = dict(tensorboard=False)
    return Config.model_validate(
        {"model": model, "data": {"corpora": [{"path": "a"}]}, "train": train, "metrics": metrics}
    )


def test_each_reason_is_told_once() -> None:
    def call(reason: str) -> None:
        if reason:
            raise OSError(reason)

    told: list[str] = []
    attempt = Attempts(told.append)
    went = [attempt("writing", call, reason) for reason in ("full", "full", "gone", "full", "", "", "full")]
    assert went == [False, False, False, False, True, True, False]
    rest = "; training goes on, and it is tried again at the next report"
    assert told == [
        f"warning: writing failed: OSError: full{rest}",
        f"warning: writing failed: OSError: gone{rest}",
        "writing does again",
    ]
    assert attempt.summary() == "writing: OSError: full"
    assert attempt("writing", call, "") and attempt.summary() == ""


def test_an_interrupt_is_no_failure() -> None:
    def call() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Attempts(print)("writing", call)


def test_a_console_that_takes_no_line_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(
        make(tmp_path), active=True, mesh=Mesh(1), nodes=(0,), device=torch.device("cpu"), peak=None, efficiency=None,
        first_step=1, text="", corpora=[],
    )  # fmt: skip
    values = {"loss_metrics/global_avg_loss": 1.0, "grad_norm": 1.0, "lr": 0.1}

    def report(step: int) -> None:
        reporter.training(step, Interval(1, 1.0, 0.0, 1, 1.0), values)

    closing = contextlib.suppress(OSError)  # it fails, too
    with closing, open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        say("lost")
        report(1)
        report(2)
    report(3)
    lines = capfd.readouterr().out.splitlines()
    assert [line[:19] for line in lines] == [f"step  {step}/10 | loss 1" for step in (1, 2, 3)]
    reader, writer = os.pipe()
    os.close(reader)
    with closing, open(writer, "w") as ended, contextlib.redirect_stdout(ended):
        for step in (4, 5):
            report(step)
        reporter.close()
    assert capfd.readouterr().err == "lsys: nothing reads the console any more; training goes on\n"
    assert Record.load(tmp_path / "scaling.json").ranks == 1


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    history = History()
    history.add(1.0, 2.0)
    record = history.record(make(tmp_path), 2, "a processor")
    assert record is not None
    path = tmp_path / "vanished" / "run" / "scaling.json"
    record.save(path)  # its folder is made anew

    def half(self: Path, text: str) -> None:
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        dataclasses.replace(record, ranks=9).save(path)
    assert Record.load(path).ranks == 2 and list(path.parent.iterdir()) == [path]
