"""Symbolic steps of several configurations, each in a process of its own.

    python -m bench.symbolic.cases < CASES > RESULTS

CASES is a JSON list of `Case`s as dictionaries; RESULTS has a line of JSON for each, in their order: a `Result`'s, or {"error": what went
wrong}. The processes are forked from one that has torch, Triton and Megatron loaded, two at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.common.tree import ROOT, with_checkout

AT_ONCE = 2


@dataclass(frozen=True)
class Case:
    """A configuration as one of its ranks sees it.

    Attributes:
        config: a YAML file of configs/. overrides: `key=value` each. steps: of which the last counts.
        planted: a name of `planted.FAULTS`. one_document: as long as a micro-batch, instead of many.
    """

    config: str
    world_size: int
    rank: int = 0
    overrides: tuple[str, ...] = ()
    micro_batches: int = 2
    steps: int = 2
    planted: str = ""
    one_document: bool = False


@dataclass
class Result:
    """What a rank did in a step.

    Attributes:
        parts: by part of the step: launches and messages by name; copies and stops as [kind, lines of code, count].
        layers: of the whole model, by number: the mixer's key and method.
        held, peak, predicted: bytes before the step, at its peak, and there by lsys's predictor. peak_part: where it is.
        unordered: accesses that nothing puts in order.
    """

    seconds: float = 0.0
    held: int = 0
    peak: int = 0
    predicted: float = 0.0
    peak_part: str = ""
    unordered: list[str] = field(default_factory=list)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, tuple[str, str]] = field(default_factory=dict)

    def launches(self, begin: str, end: str = "") -> int:
        """How many in all parts whose names begin and end so."""
        return sum(sum(part["launches"].values()) for part in self._parts(begin, end))

    def listed(self, what: str, begin: str = "", end: str = "") -> list[tuple[str, str, int]]:
        """Copies or stops of those parts."""
        return [tuple(each) for part in self._parts(begin, end) for each in part[what]]

    def _parts(self, begin: str, end: str) -> list[dict[str, Any]]:
        return [part for name, part in self.parts.items() if name.startswith(begin) and name.endswith(end)]


def results(cases: Sequence[Case]) -> list[Result]:
    """What each did.

    Raises:
        RuntimeError: of the first that did not run, with its traceback.
    """
    found = []
    for case, outcome in zip(cases, outcomes(cases), strict=True):
        if isinstance(outcome, str):
            raise RuntimeError(f"{case}\n{outcome}")
        found.append(outcome)
    return found


def outcomes(cases: Sequence[Case]) -> list[Result | str]:
    """What each did, or the traceback of what did not run."""
    command = [sys.executable, "-m", "bench.symbolic.cases"]
    words = json.dumps([asdict(case) for case in cases])
    environment = with_checkout(OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, input=words, capture_output=True, text=True, cwd=ROOT, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(cases):
        raise RuntimeError(f"{len(lines)} of {len(cases)} cases told what they did\n{done.stdout}{done.stderr}")
    return [line["error"] if "error" in line else Result(**line) for line in lines]


def _run(case: Case, mode: Any) -> Result:
    from bench.symbolic import planted, step
    from lsys.config.load import load
    from lsys.config.overrides import Override
    from lsys.predict.deployment import Deployment
    from lsys.predict.hardware import hardware

    words = [word.split("=", 1) for word in case.overrides]
    settings = load(ROOT / case.config, [Override(tuple(key.split(".")), value) for key, value in words])
    begin = time.perf_counter()
    with planted.planted(case.planted):
        held = step.run(mode, settings, case.rank, case.world_size, case.micro_batches, case.steps, case.one_document)
    found = hardware("h100", settings.train.precision)
    plan = Deployment(settings, case.world_size, found.ranks_per_node, True)
    stage = plan.mesh.coordinate(case.rank, "pipeline")
    methods = plan.methods
    watch = mode.watch
    layers = {str(n + 1): (kind.mixer, methods[kind.mixer].name) for n, kind in enumerate(settings.model.layer_kinds)}
    parts = {name: _told(counts) for name, counts in sorted(watch.parts.items())}
    faults = list(mode.device.order.faults)
    return Result(
        time.perf_counter() - begin, held, watch.peak, _predicted(plan, stage), watch.peak_part, faults, parts, layers
    )


def _predicted(plan: Any, stage: int) -> float:
    """Bytes at the peak, as `lsys check` adds them up."""
    from lsys.predict.activations import Activations
    from lsys.predict.weights import weights

    held = weights(plan, stage)
    return held.parameters + held.gradients + held.optimizer + Activations(plan).peak(stage).total


def _told(counts: Any) -> dict[str, Any]:
    return {
        "launches": dict(sorted(counts.launches.items())),
        "messages": dict(sorted(counts.messages.items())),
        "copies": [[*key, count] for key, count in sorted(counts.copies.items())],
        "stops": [[*key, count] for key, count in sorted(counts.stops.items())],
    }


def _forked(case: Case, mode: Any) -> int:
    """The end of a pipe from which the line of a new process comes."""
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.close(reads)
        try:
            line = json.dumps(asdict(_run(case, mode)))
        except BaseException:
            line = json.dumps({"error": traceback.format_exc()})
        with os.fdopen(writes, "w") as file:
            file.write(line)
        os._exit(0)
    os.close(writes)
    return reads


def main(cases: Iterable[Case]) -> None:
    from bench.symbolic import step

    mode = step.prepare()
    import lsys.train.engine  # noqa: F401 (what takes time to load, before the processes part)

    waiting: list[int] = []

    def tell() -> None:
        with os.fdopen(waiting.pop(0)) as file:
            print(file.read() or json.dumps({"error": "the process died"}), flush=True)
        os.wait()

    for case in cases:
        if len(waiting) == AT_ONCE:
            tell()
        waiting.append(_forked(case, mode))
    while waiting:
        tell()


if __name__ == "__main__":
    main([Case(**{**case, "overrides": tuple(case["overrides"])}) for case in json.load(sys.stdin)])
