"""One bit that flips where a comparison can see it: rank and tensor are named, and no checkpoint is written from it."""

import random
from pathlib import Path
from typing import Any

from bench.fault_parts.cases import drawn, outcome
from bench.fault_parts.jobs import checkpoints
from bench.fault_parts.ranks import judged
from bench.workers import faults as workers

PLAIN: dict[str, Any] = {"optimizer__distributed": False}
UPDATED = ("parameter", "exp_avg", "exp_avg_sq")  # what each rank updates itself with the plain optimizer
# ranks, changes, and what may be flipped: "forward" is a parameter in the passes of the step that is saved.
DEGREES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "DP2, plain": (2, PLAIN, UPDATED),
    "DP3, plain": (3, PLAIN, UPDATED),
    "CP2, plain": (2, PLAIN | {"parallel__context": 2}, UPDATED),
    "CP2xDP2, plain": (4, PLAIN | {"parallel__context": 2}, UPDATED),
    "DP2": (2, {}, ("forward",)),
    "DP3, overlap": (3, {"train__overlap": True}, ("forward",)),
    "CP2xDP2": (4, {"parallel__context": 2}, ("forward",)),
    "TP2": (2, {"parallel__tensor": 2}, ("parameter",)),
    "TP2xCP2": (4, {"parallel__tensor": 2, "parallel__context": 2}, ("parameter",)),
}


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Runs of six steps, saved every second, with one bit flipped in each."""
    generator = drawn(seed, "flips")
    cases = judged((_drawn(generator) for _ in range(count)), workers.flipped, _wrong, folder)
    kinds = sorted({case["what"] for case in cases})
    places = ", ".join(f"{sum(case['what'] == kind for case in cases)} in {kind}" for kind in kinds)
    return outcome(cases, f"rank and tensor named, and in no checkpoint ({places})")


def _drawn(generator: random.Random) -> tuple[int, dict[str, Any]]:
    degrees = generator.choice(list(DEGREES))
    count, changes, kinds = DEGREES[degrees]
    precision = generator.choice(("fp32", "bf16"))
    if precision == "bf16" and "plain" in degrees:
        kinds = (*kinds, "master")
    return count, {
        "degrees": degrees, "precision": precision, "what": generator.choice(kinds), "rank": generator.randrange(count),
        "step": generator.choice(range(workers.EVERY, workers.STEPS + 1, workers.EVERY)), "tensor": generator.randrange(1000),
        "word": generator.randrange(1 << 20), "bit": generator.randrange(7), "changes": changes | {"train__precision": precision},
    }  # fmt: skip


def _wrong(folder: Path, case: dict[str, Any], seen: list[dict[str, Any]]) -> str:
    """What is wrong with how such a run ended; "" if nothing is."""
    rank, count = case["rank"], len(seen)
    name, said = seen[rank]["name"], {each["error"] for each in seen}
    if not name:
        return "nothing was flipped"
    # of two copies nobody knows which is right
    who = "ranks 0, 1 hold different" if count == 2 else f"rank {rank} differs from ranks"
    for text in said:
        if f"ranks that have to hold the same do not: {who}" not in text or name not in text:
            return f"not told: {who} {name}; said: {text[-2000:]!r}"
    if len(said) > 1 or {each["code"] for each in seen} != {1}:
        return f"exit codes {[each['code'] for each in seen]}, said: {said}"
    saved = [int(path.name[5:]) for path in checkpoints(folder)]
    return f"checkpoints of steps {saved}" if saved != [*range(workers.EVERY, case["step"], workers.EVERY)] else ""
