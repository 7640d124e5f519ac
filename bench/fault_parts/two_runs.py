"""A second run in the folder of one that lives is refused and does not end it; after kill -9 the next one has it at once."""

import re
import time
from pathlib import Path
from typing import Any

from bench.fault_parts.cases import drawn, outcome
from bench.fault_parts.jobs import Job, fresh


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Refused of all second runs, by the name of the process that holds the folder; then one start after a kill."""
    generator, first = drawn(seed, "two"), Job(fresh(folder / "two"), slow=1.0, words=("--train.steps", "2000")).start()
    try:
        if not first.wait_for("step", 1):
            raise SystemExit(f"the first run did not start: {first.last_words()}")
        holder, cases = first.workers()[0], []
        for _ in range(count):
            time.sleep(generator.uniform(0.0, 1.0))
            cases.append(_refused(first, holder, generator.choice((1, 1, 2))))
        first.end()
        again, begun = Job(first.folder, words=first.words), time.time()
        try:
            came = again.start().wait_for("ready", after=begun)
            seconds = round(time.time() - begun, 1)
        finally:
            again.end()
    finally:
        first.end()
    said = f"refused, naming the process; after kill -9 the next start was ready in {seconds} s"
    if not came:
        cases.append({"ranks": again.ranks, "good": False, "text": f"not taken over: {again.last_words()}"})
    return outcome(cases, said)


def _refused(first: Job, holder: int, ranks: int) -> dict[str, Any]:
    """A second run in the folder of the first one, whose rank 0 is the process `holder`."""
    second, begun, before = Job(first.folder, ranks=ranks, words=first.words), time.time(), len(first.text())
    try:
        code = second.start().wait()
    finally:
        second.end()
    said = first.text()[before:]
    named = re.search(rf"is in use by process {holder} on ", said)
    alive = first.process is not None and first.process.poll() is None
    case = {"ranks": ranks, "good": bool(code and named and alive), "seconds": round(time.time() - begun, 1)}
    return case | (
        {}
        if case["good"]
        else {"text": f"exit code {code}, the first one {'lives' if alive else 'died'}: {said[-5000:]}"}
    )
