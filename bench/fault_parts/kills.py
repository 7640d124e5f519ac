"""kill -9 of a rank, anywhere: torchrun starts the ranks anew, and the run ends as one that was not disturbed, bit for bit."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from bench.fault_parts.cases import drawn, outcome
from bench.fault_parts.jobs import Job, checkpoints, fresh, tensors

# What is waited for before the kill, and steps of it; of start-up, that the rank is there.
MOMENTS = ("start-up", "ready", "step", "step", "checkpoint", "checkpoint", "checkpoint ended", "validation")
STEPS = {"checkpoint": (4, 8, 12, 16, 20), "checkpoint ended": (4, 8, 12, 16, 20), "validation": (8, 16)}


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Exact of all, and how long it took until the first new step."""
    generator = drawn(seed, "kills")
    whole = Job(fresh(folder / "undisturbed")).start()
    try:
        if whole.wait() != 0:
            raise SystemExit(f"the run that nobody disturbs failed: {whole.last_words()}")
    finally:
        whole.end()
    wanted, state = whole.losses(), tensors(checkpoints(whole.folder)[-1])
    cases = [_case(generator, Job(fresh(folder / f"kill-{number}")), wanted, state) for number in range(count)]
    back = sorted(case["seconds"] for case in cases if case["seconds"] is not None)
    said = "ended with the same losses and tensors, bit for bit"
    if back:
        said += f"; from the kill to the first new step {back[len(back) // 2]} s (median), {back[-1]} s at most"
    return outcome(cases, said)


def _case(generator: random.Random, job: Job, wanted: dict[int, Any], state: dict[str, str]) -> dict[str, Any]:
    moment, rank = generator.choice(MOMENTS), generator.randrange(job.ranks)
    step = generator.choice(STEPS.get(moment, tuple(range(1, 23))))
    wait = generator.uniform(0.0, 4.0 if moment == "start-up" else 0.15)
    job.start()
    try:
        if moment == "start-up":
            came = job.wait_for_rank(rank)
        else:
            came = job.wait_for(moment, 0 if moment == "ready" else step)
        if not came:
            return {"moment": moment, "step": step, "good": False, "seconds": None, "text": job.last_words()}
        time.sleep(wait)
        killed = time.time()
        os.kill(job.workers()[rank], signal.SIGKILL)
        code, wrong = job.wait(), ""
        ready = [event["time"] for event in job.events() if event["event"] == "ready" and event["time"] > killed]
        steps = [e["time"] for e in job.events() if e["event"] == "step" and ready and e["time"] > ready[0]]
        if code != 0:
            wrong = f"it ended with {code}"
        elif not ready:
            wrong = "no rank was started anew"
        elif differing := {step: seen for step, seen in job.losses().items() if seen != wanted.get(step)}:
            wrong = f"losses: {differing}"
        elif len(job.losses()) != len(wanted) or tensors(checkpoints(job.folder)[-1]) != state:
            wrong = "steps or the last checkpoint's tensors differ"
        found = {"moment": moment, "step": step, "rank": rank, "after": round(wait, 2), "good": not wrong}
        found |= {"seconds": round(steps[0] - killed, 1) if steps else None}
        return found | ({"text": f"{wrong}: {job.last_words()}"} if wrong else {})
    finally:
        job.end()
