"""A trace has lsys's ranges and the communication that the ledger saw, at their times; `lsys bench trace` sums it up."""

import contextlib
import gzip
import io
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support import delays, parity
from support.noted import noted
from torch import nn

from lsys.bench.trace import TraceError, TraceOptions, main, overlap, summarise, union
from lsys.config.schema import Profile
from lsys.observe.profiler import Communication, Operation, Profiler, named
from lsys.train.observers import Observers, Tracing


class Layer(nn.Module):
    """Looks like one of Megatron's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number, self.self_attention, self.mlp = number, LightningMixer(), nn.Linear(64, 64)

    def forward(self, x):
        return self.mlp(self.self_attention(x))


class LightningMixer(nn.Module):
    def forward(self, x):
        return x.tanh()


def traced(folder: Path, steps: int = 2) -> tuple[Path, list[Operation]]:
    """A trace of steps 2 and 3 of a run of two layers, each with an operation of 20 ms of which 5 are waited for."""
    issued: list[Operation] = []

    def communication(device):
        before = len(issued)
        return lambda: issued[before:]

    model = nn.Sequential(Layer(1), Layer(2))
    profiler = Profiler(
        Profile(first=2, steps=steps, ranks=[1]), rank=1, folder=folder, device=torch.device("cpu"),
        models=[model], communication=communication,
    )  # fmt: skip
    for number in range(1, 5):
        with profiler.step(number):
            begin = time.perf_counter()
            model(torch.ones(8, 64)).sum().backward()
            time.sleep(0.015)
            wait = time.perf_counter()
            time.sleep(0.005)
            end = time.perf_counter()
            issued.append(Operation("context", "all_gather", 1000, begin, end, [(wait, end)]))
        assert profiler.is_complete(number) == (number == 3)
        if profiler.is_complete(number):
            profiler.end()
            profiler.write()
    (path,) = folder.iterdir()
    return path, issued[1:3]


def test_a_trace_has_the_chosen_steps_their_ranges_and_communication(tmp_path):
    path, operations = traced(tmp_path)
    assert path.name == "rank1-step2.json.gz"
    events = json.load(gzip.open(path, "rt"))["traceEvents"]
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and "ts" in e}
    assert {"lsys.step 2", "lsys.step 3", "lsys.layer 1", "lsys.layer 2 Lightning", "lsys.layer 2 MLP"} <= spans.keys()
    assert "lsys.step 1" not in spans and "lsys.step 4" not in spans
    begun = [e for e in events if e.get("ph") == "b" and e.get("cat") == "lsys.communication"]
    assert [e["args"] for e in begun] == [{"bytes": 1000, "axis": "context"}] * 2
    for number, event in zip((2, 3), begun, strict=True):  # the host's clock and the profiler's are brought together
        first, last = spans[f"lsys.step {number}"]
        assert first - 500 < event["ts"] < last
    assert begun[1]["ts"] - begun[0]["ts"] == pytest.approx(1e6 * (operations[1].begin - operations[0].begin), abs=10)


def communicate(rank: int, world_size: int) -> list[Operation]:
    from lsys.parallel.comm import SequenceComm

    comm = SequenceComm(None, axis="world")
    communication = Communication(torch.device("cpu"))
    began = time.perf_counter()
    comm.all_gather(torch.ones(10))
    found = communication()
    comm.all_gather(torch.ones(10))
    assert all(began <= each.begin <= each.blocked[0][0] <= each.end <= time.perf_counter() for each in found)
    return found


def test_communication_is_seen_as_the_ledger_sees_it(gloo):
    for found in gloo(2, communicate):
        assert [(each.axis, each.name, each.bytes) for each in found] == [("world", "all_gather", 40)]


def test_the_summary_tells_hidden_from_exposed_communication(tmp_path, capsys):
    path, operations = traced(tmp_path)
    summary = summarise(path)
    assert len(summary.steps) == 2 and summary.axes["context"].calls == 2 and summary.axes["context"].bytes == 2000
    assert summary.communication == pytest.approx(sum(o.end - o.begin for o in operations), abs=1e-4)
    assert summary.exposed == pytest.approx(sum(o.end - o.blocked[0][0] for o in operations), abs=1e-4)
    assert summary.ranges["layer Lightning"][1] == 4 and summary.ranges["step"][1] == 2
    assert main(TraceOptions([tmp_path])) == 0
    assert "hidden by computation" in capsys.readouterr().out


def test_a_gpus_kernels_tell_the_overlap(tmp_path):
    def kernel(name, begin, end):
        return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "pid": 0, "tid": 7}

    step = {"ph": "X", "cat": "user_annotation", "name": "lsys.step 5", "ts": 0, "dur": 1000, "pid": 0, "tid": 1}
    copy = {**step, "cat": "gpu_user_annotation"}
    events = [step, copy, kernel("gemm", 0, 400), kernel("ncclDevKernel_AllGather", 300, 700), kernel("gemm", 600, 900)]
    path = tmp_path / "rank0-step5.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    summary = summarise(path)
    assert summary.seconds == 1e-3 and summary.communication == 4e-4 and summary.exposed == pytest.approx(2e-4)


def test_spans():
    assert union([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]
    assert overlap([(0, 2), (4, 6)], [(1, 5)]) == 2


def test_what_is_no_trace_is_refused(tmp_path):
    with pytest.raises(TraceError, match="no trace"):
        main(TraceOptions([tmp_path]))
    for text, said in ((b"x", "no trace"), (gzip.compress(b'{"traceEvents": []}'), "no step")):
        (tmp_path / "a.json.gz").write_bytes(text)
        with pytest.raises(TraceError, match=said):
            summarise(tmp_path / "a.json.gz")


def ranges_of(rank: int, world_size: int, changed: dict[str, Any]) -> list[str]:
    """The names of the ranges of a model."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = parity.settings(**changed)
    with process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        return [name for chunk in Engine(config, groups).chunks for name, _ in named(chunk.module)]


def test_variants_of_a_mixer_have_ranges_of_their_own(gloo):
    """Called as in the configuration; mixers of lsys by their modules."""
    mixers = {"far": {"kind": "window", "window": 9}, "farther": {"kind": "window", "window": 99}}
    pattern = ["window", "far", "farther", "gated_delta"]
    changes = dict(model__pattern=pattern, model__layers=4, model__window=3, model__mixers=mixers)
    (names,) = gloo(1, ranges_of, changes)
    kinds = enumerate(("Window", "far", "farther", "GatedDelta"), 1)
    assert names == [f"lsys.layer {n}{of}" for n, kind in kinds for of in ("", f" {kind}", " MLP")]


def test_a_profiler_that_is_not_asked_does_nothing(tmp_path):
    for settings in (Profile(), Profile(first=1, ranks=[0])):
        profiler = Profiler(settings, rank=1, folder=tmp_path, device=torch.device("cpu"))
        with profiler.step(1):
            pass
        assert not profiler.is_complete(1)
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_within_the_steps_leaves_no_hooks(tmp_path):
    layer = Layer(1)
    profiler = Profiler(Profile(first=1, steps=9), rank=0, folder=tmp_path, device=torch.device("cpu"), models=[layer])
    with pytest.raises(RuntimeError, match="out of memory"), profiler.step(1):
        raise RuntimeError("out of memory")
    assert not layer._forward_pre_hooks and not list(tmp_path.iterdir())


def test_a_run_that_ends_between_the_steps_says_so(tmp_path, capsys):
    """And the allocator of a GPU records no longer."""
    layer = Layer(1)
    ended: list[int] = []
    profiler = Profiler(
        Profile(first=2, steps=9, ranks=[3], memory=True), rank=3, folder=tmp_path, device=torch.device("cpu"),
        models=[layer], communication=lambda _: noted(ended, 1, list),
    )  # fmt: skip
    with mock.patch.object(torch.cuda.memory, "_record_memory_history") as history:
        with profiler.step(1):
            pass
        profiler.close()  # there is no trace to end
        assert capsys.readouterr().out == ""
        with profiler.step(2):
            pass
        profiler.device = torch.device("cuda")
        assert layer._forward_pre_hooks
        profiler.close()
        profiler.close()
        history.assert_called_once_with(enabled=None)
    assert ended == [1] and not layer._forward_pre_hooks and not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "rank 3 wrote no trace: the run ended within the traced steps, 2 to 10\n"
    with profiler.step(3):
        assert not layer._forward_pre_hooks


@pytest.mark.parametrize("fails", ["communication", "snapshot", "trace", "closing"])
def test_whatever_fails_hooks_go_and_the_allocator_records_no_longer(tmp_path, fails):
    """With the observer of every run, which is closed when it is left out."""
    layer = Layer(1)
    told: list[str] = []

    def fail(at):
        def called(*_):
            if fails == at:
                raise OSError("no space left")
            return ()

        return called

    def communication(device):
        fail("communication")()
        return fail("closing")

    profiler = Profiler(
        Profile(first=1, steps=1, ranks=[0], memory=True), rank=0, folder=tmp_path, device=torch.device("cuda"),
        models=[layer], communication=communication,
    )  # fmt: skip
    run: Any = SimpleNamespace(groups=SimpleNamespace(launch=SimpleNamespace(rank=0)))
    run.observers = Observers([Tracing(run, profiler)], told.append)
    with (
        mock.patch.object(torch.cuda.memory, "_record_memory_history") as history,
        mock.patch.object(torch.cuda.memory, "_snapshot", fail("snapshot")),
        mock.patch("lsys.observe.profiler.add_tracks", fail("trace")),
    ):
        run.observers.begin_step(1)
        layer(torch.ones(8, 64))
        run.observers.end_step(SimpleNamespace(step=1))
        calls = [call.kwargs for call in history.call_args_list]
    assert calls == [{}, {"enabled": None}] and profiler._profile is None
    assert not layer._forward_pre_hooks and not torch.autograd._profiler_enabled()
    assert len(told) == 1 and "Tracing failed and is left out from now on: OSError: no space left" in told[0]


@pytest.mark.parametrize("is_freed", [True, False])
def test_a_trace_that_no_disk_takes_waits_and_is_tried_at_each_report(tmp_path, capsys, is_freed):
    folder = tmp_path / "profile"
    folder.write_text("in the way")
    profiler = Profiler(Profile(first=1, steps=1), rank=0, folder=folder, device=torch.device("cpu"))
    run: Any = SimpleNamespace(
        groups=SimpleNamespace(launch=SimpleNamespace(rank=0)),
        settings=SimpleNamespace(metrics=SimpleNamespace(every=2)),
    )
    told: list[str] = []
    run.observers = Observers([Tracing(run, profiler)], told.append)
    for step in range(1, 7):
        run.observers.begin_step(step)
        torch.ones(8).sum()
        if step == 5 and is_freed:
            folder.unlink()
        run.observers.end_step(SimpleNamespace(step=step))
        assert folder.is_dir() == (step == 6 and is_freed)
    run.observers.close(False)
    said = capsys.readouterr().out.splitlines()
    assert not told and said[0].startswith("rank 0: warning: writing a trace (train.profile) failed: FileExistsError: ")
    if is_freed:
        assert summarise(folder / "rank0-step1.json.gz").seconds > 0 and len(list(folder.iterdir())) == 1
        assert said[1] == f"rank 0 wrote {folder / 'rank0-step1.json.gz'}" and said[2].endswith("does again")
    else:
        assert len(said) == 2 and said[1].startswith("rank 0: warning: could not be written: writing a trace")


def stopped(rank: int, world_size: int) -> tuple[int, str, int]:
    """SIGTERM in the first of the traced steps: the steps that were done, what was printed, observers that are left."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.parallel.ledger.hooks import HOOKS
    from lsys.train.run import Run

    step, said = Run._train_step, io.StringIO()

    def ask(whole: Run, *args: Any) -> Any:
        taken = step(whole, *args)
        if whole.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    with mock.patch.object(Run, "_train_step", ask), contextlib.redirect_stdout(said):
        done = delays.run(rank, world_size, {"train__profile": Profile(first=2, steps=4, ranks=[0]).model_dump()})
    return len(done), said.getvalue(), len(HOOKS._observers)


def test_sigterm_within_the_traced_steps(gloo):
    for rank, (steps, said, observers) in enumerate(gloo(2, stopped)):
        assert steps == 2 and observers == 0
        assert ("rank 0 wrote no trace: the run ended within the traced steps, 2 to 5" in said) == (rank == 0)
