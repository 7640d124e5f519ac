"""Plants faults in runs, and judges what lsys does.

    python bench/faults.py --seed 1 [--section kills two ...] [--count kills=40 two=20 ...] [--out build/faults.json] [--page docs/benchmarks/faults.md]

Sections (all if none is named); what one found is in --out after it, which keeps what was found of others:
  damage   the newest checkpoint is damaged: refused, renamed, told, and the previous one used
  stale    one rank sees an older listing, manifest or other bytes: all refuse, or all have the same checkpoint
  kills    kill -9 of a rank at a drawn moment: start-up, a step, a save, a validation; the run ends exactly as undisturbed
  nan      a NaN or an infinity at a step, a save step or the last: told with step, name and rank, and in no checkpoint
  flips    a bit of what several ranks hold alike: rank and tensor named, and no checkpoint written from it
  sizes    batch, micro-batch, window and degrees change at resumes: no token is read twice or never
  two      a second run in the folder of one that lives is refused

The exit code is 1 if any case of a section that ran was not good; such cases are printed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # their workers and the faults that they plant
sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import json
import os
import platform
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.common.tree import ROOT
from bench.fault_parts import damages, flips, kills, nan, sizes, two_runs

Section = Callable[[int, int, Path], dict[str, Any]]
SECTIONS: dict[str, tuple[Section, int, str]] = {
    "damage": (damages.run, 200, "a damaged checkpoint"),
    "stale": (damages.run_stale, 20, "a rank that sees a checkpoint otherwise"),
    "kills": (kills.run, 40, "kill -9 of a rank"),
    "nan": (nan.run, 100, "a NaN or an infinity"),
    "flips": (flips.run, 20, "a flipped bit"),
    "sizes": (sizes.run, 20, "sizes and degrees that change"),
    "two": (two_runs.run, 20, "a second run in a folder"),
}


def _in_one_line(case: dict[str, Any]) -> str:
    shown = ", ".join(f"{key} {value}" for key, value in case.items() if key not in ("good", "text", "changes"))
    return f"{shown}: {' '.join(case.get('text', '').split())[:300]}"


def page(found: dict[str, Any]) -> str:
    """Markdown: a row for each section that was run."""
    rows = [
        "| fault | good | of | what happened | seed | minutes | commit |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for name, section in found.items():
        title = SECTIONS[name][2]
        rows.append(
            f"| {title} | {section['good']} | {section['of']} | {section['said']} | {section['seed']} | {section['minutes']} | {section['commit']} |"
        )
    machines = ", ".join(dict.fromkeys(section["machine"] for section in found.values()))
    lines = ["# Faults, planted", "", f"`python bench/faults.py`; {machines}. Cases are drawn by seed.", "", *rows]
    for name, section in found.items():
        bad = [case for case in section["cases"] if not case["good"]]
        lines += ["", f"Not good of {SECTIONS[name][2]}:", *(f"- {_in_one_line(case)}" for case in bad)] if bad else []
    return "\n".join(lines) + "\n"


def counts(words: list[str]) -> dict[str, int]:
    """Cases of each section, as asked for by SECTION=N. Raises ValueError."""
    found = {name: SECTIONS[name][1] for name in SECTIONS}
    for word in words:
        name, _, number = word.partition("=")
        if name not in SECTIONS or not number.isdigit() or not int(number):
            raise ValueError(
                f"--count {word}: SECTION=N is wanted, a section of {', '.join(SECTIONS)} and a number from 1 on"
            )
        found[name] = int(number)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--section", nargs="*", choices=list(SECTIONS), default=[])
    parser.add_argument("--count", nargs="*", default=[], help="SECTION=N")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "faults.json")
    parser.add_argument("--page", type=Path, default=None)
    options = parser.parse_args()
    try:
        wanted = counts(options.count)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs are ended and folders removed
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    about = {"seed": options.seed, "commit": commit, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    sections = options.section or list(SECTIONS)
    for name in sections:
        begun, (section, _, title) = time.monotonic(), SECTIONS[name]
        with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
            result = section(options.seed, wanted[name], Path(folder))
        found[name] = {**result, **about, "minutes": round((time.monotonic() - begun) / 60, 1)}
        print(f"{title}: {result['good']} of {result['of']} {result['said']}", flush=True)
        for case in result["cases"]:
            if not case["good"]:
                print(f"NOT GOOD: {case}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.page:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(page({name: found[name] for name in SECTIONS if name in found}))
    return int(any(found[name]["good"] < found[name]["of"] for name in sections))


if __name__ == "__main__":
    sys.exit(main())
