"""How long a user waits: `lsys --help`, `lsys check`, and torchrun to the first step with two ranks.

    python bench/startup.py

Prints the best of several runs in seconds. The light commands must be below 1.5 s; the exit code says whether they are.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import re
import subprocess
import tempfile
import time

from bench.common.tree import ROOT, with_checkout

LIMIT = 1.5
CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def best(command: list[str], runs: int) -> float:
    """Seconds of the fastest run of a command."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=with_checkout())
        times.append(time.perf_counter() - began)
    return min(times)


def first_step(prefix: str) -> float:
    """Seconds from starting torchrun to the line of the first step; two ranks of the quickstart's model."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = f"--train.folder {folder} --train.steps 2 --train.validate_every 0 --train.validate_tokens 0"
        overrides += " --optimizer.warmup_steps 0 --metrics.every 1 --checkpoint.every 0"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "lsys",
            "train",
            CONFIG,
        ]
        command += [*overrides.split(), "--checkpoint.save", "false", "--data.corpora.0.path", prefix]
        began = time.perf_counter()
        variables = with_checkout(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables) as process:
            assert process.stdout
            reached = next((time.perf_counter() for line in process.stdout if re.match(r"step +1/", line)), None)
            process.stdout.read()
        if reached is None or process.returncode:
            raise SystemExit(
                f"the run ended with code {process.returncode} and {'no' if reached is None else 'a'} first step"
            )
        return reached - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--corpus",
        default="data/stdlib",
        help="prefix of a prepared byte corpus; without it the first step is not measured",
    )
    arguments = parser.parse_args()
    lsys = [sys.executable, "-m", "lsys"]
    commands = {
        "lsys --help": [*lsys, "--help"],
        "lsys check": [*lsys, "check", CONFIG, "--world-size", "2"],
        "lsys topology": [*lsys, "topology", CONFIG, "--world-size", "2"],
    }
    print(f"{'command':32} {'best of ' + str(arguments.runs):>10}   limit")
    slow = False
    for name, command in commands.items():
        seconds = best(command, arguments.runs)
        slow |= seconds > LIMIT
        print(f"{name:32} {seconds:8.2f} s   {LIMIT} s{'  EXCEEDED' if seconds > LIMIT else ''}")
    if (ROOT / f"{arguments.corpus}.idx").exists():
        seconds = min(first_step(arguments.corpus) for _ in range(2))
        print(f"{'torchrun, 2 ranks, to step 1':32} {seconds:8.2f} s   (best of 2)")
    else:
        print(f"torchrun to step 1: {arguments.corpus}.idx is not there; run `make train` first, or name a --corpus")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
