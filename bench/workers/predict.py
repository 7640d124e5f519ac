"""One rank of `bench/predict.py`: runs steps of small models under torchrun and writes what all ranks saw as JSON.

torchrun --standalone --nproc-per-node 2 bench/workers/predict.py CASES.json RESULTS.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds lsys and bench here

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist

from bench.common.tools import serve
from lsys.config import Config
from lsys.data.plan import Planner
from lsys.mixers.card import Layer
from lsys.observe.waterfall_recorder import Recorder
from lsys.parallel.ledger import record
from lsys.parallel.ledger.hooks import HOOKS, Observer
from lsys.parallel.replay import Link, fastest, gather_programs, recorded_program, simulate
from lsys.runtime.environment import launch_from_environment
from lsys.runtime.groups import process_groups

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from support.memory import engine_bytes, peak_bytes


@dataclass(frozen=True)
class Case:
    """tree: the configuration. wants_layers: time layers one by one, and operations, for a calibration. links: for the replay.

    replayed: steps of which the replay takes the least. About as many as a calibration has samples of a layer (steps x micro-batches,
    those for bytes and memory included), or one would be the least of more than the other.
    """

    name: str
    ranks: int
    tree: dict[str, Any]
    steps: int = 4
    replayed: int = 16
    wants_layers: bool = False
    links: tuple[float, float] = (1e-4, 1e9)


class OneDocument:
    """A stream whose every micro-batch is one document."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def batch(self, start: int, count: int) -> Any:
        tokens = np.random.default_rng(start).integers(0, self.vocab, count)
        mask = np.ones(count, dtype=np.float32)
        return SimpleNamespace(lengths=np.array([count]), tokens=tokens, targets=tokens, loss_mask=mask)


class InsideOperations(Observer):
    """Adds up the CPU seconds of operations of communication."""

    clock, seconds = time.thread_time, 0.0

    def issued(self, call: Any, before: float, after: float) -> None:
        self.seconds += after - before

    waited = issued


class LayerTimes:
    """CPU seconds of this thread in each layer, its channel mixer, forward and backward; issuing operations of communication is not in it.

    inside: the CPU seconds spent in such operations so far.
    """

    def __init__(self, engine: Any, kinds: Sequence[Layer], inside: InsideOperations) -> None:
        self.inside = inside
        self.rows: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
        layers = [layer for chunk in engine.chunks for layer in chunk.module.decoder.layers]
        for layer, kind in zip(layers, kinds, strict=True):
            self._watch(layer, ("layer", kind.mixer, kind.channels))
            if layer.has_channels:
                self._watch(layer.mlp, ("channels", kind.mixer, kind.channels))
        self.outside: list[float] = []
        layers[-1].register_forward_hook(self._beyond)

    def _beyond(self, module: Any, args: Any, output: Any) -> None:
        began = self.clock()
        output[0].register_hook(lambda _: self.outside.append(self.clock() - began))

    def clock(self) -> float:
        return time.thread_time() - self.inside.seconds

    def _watch(self, module: Any, key: tuple[str, str, str]) -> None:
        """Backward time is from the gradient of the output to that of the input, which tensor hooks see."""
        began: dict[str, float] = {}

        def mark(way: str) -> Any:
            return lambda _: began.__setitem__(way, self.clock())

        def stop(way: str) -> Any:
            return lambda _: self.rows[(*key, way)].append(self.clock() - began[way])

        def before(_: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if x.requires_grad:
                x.register_hook(stop("backward"))
            began["forward"] = self.clock()

        def after(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            stop("forward")(None)
            y = output[0] if isinstance(output, tuple) else output
            if y.requires_grad:
                y.register_hook(mark("backward"))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)

    def output(self) -> float:
        """From the end of the layers to the gradient that comes back to them."""
        return min(self.outside)

    def take(self) -> list[list[Any]]:
        """[module, token mixer, channel mixer, way, the least seconds]."""
        return [[*key, min(times)] for key, times in self.rows.items()]


def measure(case: Case) -> dict[str, Any]:
    config = Config.model_validate(case.tree)
    train, parallel, steps = config.train, config.parallel, []
    with process_groups(parallel, launch_from_environment()) as groups:
        from lsys.train.engine import Engine  # imports megatron, which `process_groups` prepares

        engine = Engine(config, groups)
        stream: Any = OneDocument(config.model.vocab)
        degrees = (parallel.context, parallel.tensor, parallel.layout)
        planner = Planner(stream, train.batch_tokens, train.micro_batch_tokens, *degrees)

        def batches(step: int) -> Any:
            return planner.step(step, groups.data_rank, groups.data_size).on_rank(
                groups.context_rank, groups.device, groups.context
            )

        engine.forward_backward(batches(0))
        engine.step()
        inside = InsideOperations()
        HOOKS.add(inside)
        layers = LayerTimes(engine, config.model.layer_kinds, inside) if case.wants_layers else None
        cpu, recorder = [], Recorder(groups)
        with recorder.recording(first=1):
            for step in range(1, case.steps + 1):
                ready = batches(step)
                dist.barrier()
                recorder.end_step(10 * step)  # the preparation is a step of its own, and forgotten
                recorder.take()
                marks = [time.thread_time() - inside.seconds]
                with recorder.region("compute"):
                    engine.forward_backward(ready)
                    marks.append(time.thread_time() - inside.seconds)
                    engine.step()
                    marks.append(time.thread_time() - inside.seconds)
                recorder.end_step(10 * step + 1)
                waterfall = recorder.take()
                assert waterfall is not None  # of the step just recorded
                steps.append({"seconds": waterfall.seconds, "parts": waterfall.parts})
                cpu.append([b - a for a, b in zip(marks, marks[1:], strict=False)])
        HOOKS.remove(inside)
        ready = batches(case.steps + 1)
        with record() as ledger:
            engine.forward_backward(ready)
            engine.step()
        moved = {
            f"{axis} {link} {way}": ledger.bytes(axis=axis, link=link, direction=way)
            for axis in {event.axis for event in ledger.events}
            for link in ("node", "network")
            for way in ("sent", "received")
        }
        peak = peak_bytes(engine, batches(case.steps + 2))
        engine.step()
        mine = {"cpu": cpu, "bytes": moved, "held": engine_bytes(engine), "peak": peak}
        mine["layers"], mine["output"] = (layers.take(), layers.output()) if layers else ([], 0.0)
        mine["events"] = transfers(engine, batches(case.steps + 3)) if case.wants_layers else []
        timeline = None if case.wants_layers else replay(case, engine, batches)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    return {"name": case.name, "steps": steps, "ranks": every, "replay": timeline}


def cut_programs(engine: Any) -> None:
    """From now on, marks in programs where layers begin and end, forward and backward: barriers of a group of this rank alone.

    The least times of a layer, of which a calibration is made, add up to less than the least time of what no operation interrupts.
    """
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def mark(*unused: Any) -> None:
        dist.barrier(alone)

    def after(_: Any, args: Any, output: Any) -> None:
        mark()
        if output[0].requires_grad:
            output[0].register_hook(mark)

    for chunk in engine.chunks:
        for layer in chunk.module.decoder.layers:
            layer.register_forward_pre_hook(mark)
            layer.register_forward_hook(after)


def replay(case: Case, engine: Any, batches: Any) -> dict[str, Any]:
    """A step as if each rank had a core of its own: its seconds and parts, means over the ranks."""
    cut_programs(engine)
    runs = []
    for step in range(case.replayed):
        ready = batches(step + 100)
        with record(programs=True) as ledger:
            engine.forward_backward(ready)
            engine.step()
        runs.append(recorded_program(ledger))
    timeline = simulate(gather_programs(fastest(runs)), {"node": Link(*case.links)}, backend="gloo")
    return {"seconds": timeline.seconds, "parts": timeline.parts}


def transfers(engine: Any, ready: Any) -> list[list[Any]]:
    """[axis, kind, bytes, ranks, seconds blocked] of a step's operations."""
    with record() as ledger:
        engine.forward_backward(ready)
        engine.step()
    return [
        [e.axis, e.operation.kind, max(sum(e.sent.values()), sum(e.received.values())), len(e.ranks), e.exposed]
        for e in ledger.events
    ]


if __name__ == "__main__":
    serve(Case, measure)
