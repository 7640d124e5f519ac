"""Cases of `bench/gpu.py` in processes of their own: one that hangs, dies or spoils its GPU context costs itself alone.

    python bench/gpu_parts/child.py MODULE CASES.json RESULTS.jsonl

runs `MODULE.run(case)` for each case and appends what it returns, a line each. The other half of this file starts such
processes, reads the lines as they come, and goes on behind a case that ended its process. Needs the standard library.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Case = dict[str, Any]
Record = Callable[[Case], None]
SPOILED = 3  # exit status after a case whose error no later one would survive
OUT_OF_TIME = "out of time"


# ---- the process


def short(error: str, lines: int = 12) -> str:
    """The end of a traceback, or of what a process said."""
    return "\n".join(error.strip().splitlines()[-lines:])[-2000:]


def spoiled() -> bool:
    """Whether the GPU context is unusable, as after an illegal memory access."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def serve(module: str, cases: str, results: str) -> None:
    run = importlib.import_module(module).run
    for index, case in enumerate(json.loads(Path(cases).read_text())):
        began = time.perf_counter()
        try:
            found = run(case)
        except Exception:
            found = {"status": "failed", "error": short(traceback.format_exc())}
        found |= {"index": index, "seconds": round(time.perf_counter() - began, 2)}
        is_spoiled = spoiled()  # an error may show only now
        if is_spoiled and "error" not in found:
            found |= {"status": "failed", "error": "the GPU context is unusable after this case"}
        with open(results, "a") as file:
            file.write(json.dumps(found) + "\n")
        if is_spoiled:
            os._exit(SPOILED)


# ---- those who start it


def run_groups(
    module: str,
    groups: Sequence[Sequence[Case]],
    record: Record,
    *,
    environment: Mapping[str, str],
    deadline: float,
    jobs: int = 1,
    limit: float = 240.0,
) -> None:
    """Every case, each group in one process, `jobs` of them at a time; `record` gets cases with their results.

    Args:
        deadline: of `time.monotonic`; cases that it cuts off are recorded as skipped.
        limit: seconds that one case may take.
    """

    def one(group: Sequence[Case]) -> None:
        left = list(group)
        while left and time.monotonic() < deadline:
            finished, why = _run(module, left, record, environment, deadline, limit)
            left = left[finished:]
            if left and why:  # the first of them ended the process
                record(left[0] | {"status": "failed", "error": why})
                left = left[1:]
        for case in left:
            record(case | {"status": "skipped", "error": OUT_OF_TIME})

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, groups))


def _run(
    module: str, cases: list[Case], record: Record, environment: Mapping[str, str], deadline: float, limit: float
) -> tuple[int, str | None]:
    """How many cases one process finished, and what ended it before the next, if neither the clock nor a spoiled context."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, results, said = (Path(folder) / name for name in ("cases.json", "results.jsonl", "said"))
        wanted.write_text(json.dumps(cases))
        results.touch()
        command = [sys.executable, __file__, module, str(wanted), str(results)]
        finished, since, killed = 0, time.monotonic(), None
        with said.open("w") as output:
            process = subprocess.Popen(
                command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            while True:
                ended = process.poll() is not None  # asked before the last look
                lines = results.read_text().split("\n")[:-1]  # whole ones
                for line in lines[finished:]:
                    found = json.loads(line)
                    record(cases[found.pop("index")] | found)
                    since = time.monotonic()
                finished = len(lines)
                if ended:
                    break
                now = time.monotonic()
                if now > deadline or now - since > limit:
                    killed = OUT_OF_TIME if now > deadline else f"no result after {limit:.0f} s"
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                    process.wait()
                time.sleep(0.05)
        if killed == OUT_OF_TIME or process.returncode in (0, SPOILED):
            return finished, None
        return finished, killed or f"exit status {process.returncode}: {short(said.read_text())}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds lsys and bench here
    serve(*sys.argv[1:])
