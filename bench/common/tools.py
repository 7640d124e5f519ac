"""What benchmarks of several ranks share: launching workers, tables, sections of figures."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.common.tree import ROOT, with_checkout

LAB = str(ROOT / "launch" / "lab.sh")


def launch(worker: str, cases: Sequence[Any], ranks: int, rate: str | None = None) -> list[dict[str, Any]]:
    """The results of the worker, a file of bench/workers that takes two others, for cases, which are dataclasses.

    With a rate, every rank is a node of the lab behind a link of that rate (network namespaces, root).
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/cases.json", f"{folder}/results.json"]
        Path(paths[0]).write_text(json.dumps([asdict(case) for case in cases]))
        variables = with_checkout(OMP_NUM_THREADS="1", LAB=f"bench-{os.getpid()}")
        torchrun, script = str(Path(sys.executable).parent / "torchrun"), str(ROOT / "bench" / "workers" / worker)
        if rate is None:
            command = [torchrun, "--standalone", "--nproc-per-node", str(ranks), script, *paths]
        else:
            command = [LAB, "torchrun", folder, script, *paths]
            variables |= {"TORCHRUN": torchrun, "RANKS": "1"}
            subprocess.run([LAB, "up", str(ranks), rate], env=variables, check=True)
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            if done.returncode:
                logs = "".join(log.read_text() for log in Path(folder).glob("*.log"))
                raise SystemExit(f"{done.stdout}{done.stderr}{logs}")
        finally:
            if rate is not None:
                subprocess.run([LAB, "down"], env=variables, check=True)
        return json.loads(Path(paths[1]).read_text())


def serve(kind: type, measure: Callable[[Any], dict[str, Any]]) -> None:
    """The worker's side of `launch`: each rank of a gloo group measures all cases, of a kind; the first writes the results."""
    cases, results = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = [measure(kind(**case)) for case in json.loads(cases.read_text())]
    if dist.get_rank() == 0:
        results.write_text(json.dumps(measured))
    dist.destroy_process_group()


def made_on(hardware: str, versions: Mapping[str, str], commit: str) -> str:
    """What a page of figures says of where they come from."""
    return f"{hardware}; {', '.join(f'{name} {version}' for name, version in versions.items())}; commit {commit}"


def show(title: str, heads: list[str], rows: list[list[Any]]) -> None:
    print(f"\n{title}")
    for row in [heads, *rows]:
        print(" | ".join(f"{cell:>12.4g}" if isinstance(cell, float) else f"{cell!s:>12}" for cell in row), flush=True)


def run_sections(
    known: Mapping[str, Callable[[Any], dict[str, Any]]], wanted: Sequence[str], options: Any, out: Path | None
) -> None:
    """Run the wanted sections, all if none is, on one thread; their figures go to `out`, where others keep theirs."""
    torch.set_num_threads(1)
    unknown = set(wanted) - known.keys()
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: no section; there are {', '.join(known)}")
    figures = json.loads(out.read_text()) if out and out.exists() else {}
    for name in wanted or known:
        figures[name] = known[name](options)
        if out:
            out.write_text(json.dumps(figures, indent=1) + "\n")
