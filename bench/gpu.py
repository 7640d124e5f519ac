"""Everything that only a GPU can tell, in one command that runs from a bare tree: kernels checked, timed, and a training run.

    python bench/gpu.py [--section environment correct speed train] [--out build/gpu] [--wheels DIR] [--minutes 8]

Sections (all if none is named), each with its own share of time; what is left then is recorded as skipped:
  environment  the GPU, versions, packages to compare with; bandwidth of copies and the rate of bf16 products
  correct      every kernel against its definition in fp64: outputs, gradients, states, causality to the bit
  speed        linear attention beside flash-linear-attention, softmax attention beside PyTorch's fastest and flash-attn
  train        the trainer on one GPU, if megatron-core and the rest are there, and the tests that need CUDA

`correct` and `speed` need torch and triton alone; lsys need not be installed. Results are written after each case, as
gpu.json and gpu.md. Exit status 1 if anything of lsys fails; peers that fail or are missing are notes. With `--smoke` all
is tiny and runs without a GPU, Triton interpreted: to see that this script works. Its times mean nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import json
import os
import subprocess
import tempfile
import threading
import time
from typing import Any

from bench.common.tree import ROOT, with_checkout
from bench.gpu_parts.child import Case, run_groups, short
from bench.gpu_parts.report import markdown

SECTIONS = ("environment", "correct", "speed", "train")


class Results:
    """Figures of all sections, on disk after each case. Sections that are not run keep what the files have of them."""

    def __init__(self, folder: Path, smoke: bool) -> None:
        self.folder, self.smoke, self.lock = folder, smoke, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / ("smoke.json" if smoke else "gpu.json")  # so that the one is never taken for the other
        self.sections: dict[str, list[Case]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def begin(self, section: str) -> None:
        self.sections[section] = []
        self.write()

    def add(self, section: str, case: Case) -> None:
        with self.lock:
            self.sections[section].append(case)
            self.write()
            said = (case.get("error") or case.get("note") or "").split("\n")[-1]
            worst = f"{case['worst']:.1e}" if isinstance(case.get("worst"), float) else case.get("worst", "")
            words = f"{section}: {case['status']} {case.get('seconds', '')} s {case['name']} {worst} {said}"
            print(words.rstrip(), flush=True)

    def write(self) -> None:
        for path, text in (
            (self.path, json.dumps(self.sections, indent=1)),
            (self.path.with_suffix(".md"), markdown(self.sections, self.smoke)),
        ):
            new = path.with_suffix(".new")
            new.write_text(text + "\n")
            new.replace(path)  # whole, whenever the command is stopped

    def failed(self, sections: list[str]) -> list[str]:
        return [case["name"] for section in sections for case in self.sections[section] if case["status"] == "failed"]


def environment_of_cases(folder: Path, wheels: Path | None, smoke: bool) -> dict[str, str]:
    found = with_checkout()
    if wheels is not None:
        site = folder / "site"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, *map(str, sorted(wheels.glob("*.whl")))], check=True)
        checkout, *others = found["PYTHONPATH"].split(os.pathsep)
        found["PYTHONPATH"] = os.pathsep.join([checkout, str(site), *others])
    found.pop("TRITON_INTERPRET", None)
    found |= {"OMP_NUM_THREADS": found.get("OMP_NUM_THREADS", "1"), "PYTHONSAFEPATH": "1"}
    return found | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if smoke else {})


CASES = """
import importlib, json, sys
name, smoke, scratch = sys.argv[1:]
module = importlib.import_module(name)
warming = getattr(module, "warming", lambda smoke: [])
print(json.dumps({"groups": module.groups(bool(smoke), scratch), "warming": warming(bool(smoke))}))
"""


def cases_of(section: str, smoke: bool, folder: Path, environment: dict[str, str]) -> Any:
    """Made where torch and lsys can be imported."""
    if section == "environment":
        return {"groups": [[{"name": "machine", "family": "machine"}]], "warming": []}
    command = [
        sys.executable,
        "-c",
        CASES,
        f"bench.gpu_parts.{section}",
        "smoke" if smoke else "",
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(short(done.stderr))
    return json.loads(done.stdout.splitlines()[-1])


def run_section(
    section: str, results: Results, options: argparse.Namespace, folder: Path, environment: dict[str, str]
) -> None:
    results.begin(section)
    deadline = time.monotonic() + 60 * options.minutes
    try:
        found = cases_of(section, options.smoke, folder, environment)
    except RuntimeError as failure:
        return results.add(section, {"name": "the cases themselves", "status": "failed", "error": str(failure)})
    for case in (case for group in found["groups"] for case in group):
        if options.fault and options.fault in case["name"]:
            case["fault"] = True
    module = f"bench.gpu_parts.{'speed' if section == 'environment' else section}"
    limit = 60 * options.minutes if section == "train" else 240.0

    def record(case: Case) -> None:
        results.add(section, case)

    if found["warming"]:
        # Tuning side by side would measure the others' load: what it finds is not kept, what it compiles is.
        cold = environment | {"FLA_CACHE_RESULTS": "0"}
        ready = min(deadline, time.monotonic() + 30 * options.minutes)

        def told(case: Case) -> None:
            if case["status"] == "failed":
                print(f"{section}: could not warm up {case['name']}: {case['error']}", flush=True)

        run_groups(module, found["warming"], told, environment=cold, deadline=ready, jobs=options.jobs)
    jobs = options.jobs if section == "correct" else 1  # what is timed has the GPU to itself
    run_groups(module, found["groups"], record, environment=environment, deadline=deadline, jobs=jobs, limit=limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="the folder of gpu.json and gpu.md")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use, installed nowhere else")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each section")
    parser.add_argument(
        "--jobs", type=int, default=max((os.cpu_count() or 1) - 4, 1), help="processes that compile and check"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, without a GPU; writes smoke.json and smoke.md")
    parser.add_argument("--fault", help="plant an error in the results of cases whose name contains this")
    options = parser.parse_args()
    results = Results(options.out, options.smoke)
    with tempfile.TemporaryDirectory(prefix="lsys-gpu-") as name:
        environment = environment_of_cases(Path(name), options.wheels, options.smoke)
        for section in options.section:
            run_section(section, results, options, Path(name), environment)
    failed = results.failed(options.section)
    shown = {name: results.sections[name] for name in options.section if name != "correct"}  # that one is long
    print(markdown(shown, options.smoke))
    print(f"{results.path.with_suffix('.md')}: {len(failed)} failed{': ' if failed else ''}{'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
