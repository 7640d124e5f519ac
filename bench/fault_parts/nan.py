"""A NaN or an infinity in a gradient or in a module's output: in no checkpoint, and told with step, parameter or module, and rank."""

import math
import random
from pathlib import Path
from typing import Any

import torch

from bench.fault_parts.cases import drawn, outcome
from bench.fault_parts.jobs import checkpoints, stored
from bench.fault_parts.ranks import judged
from bench.workers import faults as workers

DEGREES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, plain": (1, {"optimizer__distributed": False}),
    "DP2": (2, {}),
    "DP2, plain": (2, {"optimizer__distributed": False}),
    "DP2, overlap": (2, {"train__overlap": True}),
    "TP2": (2, {"parallel__tensor": 2}),
    "CP2": (2, {"parallel__context": 2}),
    "PP2xVPP2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "DP4": (4, {}),
    "TP2xPP2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "TP2xCP2": (4, {"parallel__tensor": 2, "parallel__context": 2}),
    "CP2xDP2, plain": (4, {"parallel__context": 2, "optimizer__distributed": False}),
}
PLACES = {"a save step": (2, 4), "a step": (1, 3, 5), "the last step": (workers.STEPS,)}
MODULES = (
    "3.mlp.linear_fc1",
    "final_layernorm",
)  # behind the last attention: what is before one is an error of that kernel


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Runs of six steps, saved every second, with one number planted in each."""
    generator = drawn(seed, "nan")
    cases = judged((_drawn(generator) for _ in range(count)), workers.not_finite, _wrong, folder)
    places = ", ".join(f"{sum(case['place'] == place for case in cases)} at {place}" for place in PLACES)
    return outcome(cases, f"told with step, name and rank, and in no checkpoint ({places})")


def _drawn(generator: random.Random) -> tuple[int, dict[str, Any]]:
    degrees, place = generator.choice(list(DEGREES)), generator.choice(list(PLACES))
    count, changes = DEGREES[degrees]
    precision = generator.choice(("fp32", "bf16"))
    # with stages the rank may have neither module
    module = generator.choice(MODULES) if generator.random() < 0.25 and "PP" not in degrees else ""
    return count, {
        "degrees": degrees, "precision": precision, "place": place, "step": generator.choice(PLACES[place]),
        "rank": generator.randrange(count), "value": generator.choice((math.nan, math.inf, -math.inf)), "module": module,
        "parameter": generator.randrange(1000), "changes": changes | {"train__precision": precision},
    }  # fmt: skip


def _wrong(folder: Path, case: dict[str, Any], seen: list[dict[str, Any]]) -> str:
    """What is wrong with how such a run went; "" if nothing is."""
    step, name, said = case["step"], seen[case["rank"]]["name"], seen[0]["said"]
    if not name:
        return "nothing was planted"
    what = "output" if case["module"] else "gradient"
    told = f"step {step}: no update was made: the {what} of {name} is not finite on rank {case['rank']} "
    if told not in said:
        return f"not told: {told!r}; said: {said[-2000:]}{seen[0]['error']}"
    is_last = step == workers.STEPS
    if {rank["code"] for rank in seen} != {int(is_last)}:
        return f"exit codes {[rank['code'] for rank in seen]}: {seen[0]['error']}"
    # a save is made up for after the next step; that of the last is never made
    due = [step + 1 if each == step else each for each in range(workers.EVERY, workers.STEPS + 1, workers.EVERY)]
    saved = [int(path.name[5:]) for path in checkpoints(folder)]
    if saved != [each for each in due if each <= workers.STEPS]:
        return f"checkpoints of steps {saved}: {said[-2000:]}"
    for path in checkpoints(folder):
        for key, tensor in stored(path).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"{path.name} has a number in {key} that is not finite"
    return ""
