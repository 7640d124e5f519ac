"""Do the tests notice? Plants faults, one at a time, and runs what `make test-fast` runs until a test fails.

    python bench/mutations.py --seed 1 --count 130 --out build/mutations.json --minutes 55 [--page docs/benchmarks/mutations.md]

Faults are (a) those that were once found to pass every test (bench/mutation_parts/known.py), single and many at once, and (b) drawn by
seed from all places where an operator of bench/mutation_parts/operators.py applies, each package in proportion to its lines. A drawn
fault that does not import, or stops the first step of the quickstart, needs no test and does not count: the next one is taken.

Each runs in a copy of the checkout of its own, in a fork of a process that has torch and Megatron loaded; nearest tests first. What has
been judged is in --out after each fault; the same command goes on from there. Two runs at a time by default. A fault that survives costs
the whole of `make test-fast`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds bench here

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from queue import Empty, Queue
from typing import Any

from bench.common.tree import ROOT
from bench.mutation_parts.known import KNOWN, Known
from bench.mutation_parts.near import in_order
from bench.mutation_parts.operators import Mutant, mutants
from bench.mutation_parts.page import page

SOURCES = ("lsys", "kernels", "parallel", "launch")
STEP_SECONDS = 120  # that the first step of the quickstart may take
TEST_SECONDS = 2400


@dataclass(frozen=True)
class Verdict:
    """What came of a fault: "caught" by a test, "survived", or "no fault" where it needs no test."""

    name: str
    group: str
    old: str
    new: str
    outcome: str
    by: str
    seconds: float


class Copy:
    """A copy of the checkout and the server that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "checkout", folder / "log.txt"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.folder)], check=True)
        for data in (ROOT / "data").glob("stdlib.*"):
            (self.folder / "data").mkdir(exist_ok=True)
            os.symlink(data, self.folder / "data" / data.name)
        paths = [str(self.folder), str(self.folder / "tests"), str(self.folder / "examples")]
        temporary = folder / "tmp"
        temporary.mkdir()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)
        }  # fmt: skip
        words = [sys.executable, "-m", "bench.mutation_parts.server"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(words, cwd=self.folder, env=environment, stderr=subprocess.DEVNULL, **pipes)
        if not self._read().get("ready"):
            raise SystemExit("the server of forks did not start")

    def ask(self, what: str, limit: float, **more: Any) -> dict[str, Any]:
        assert self.server.stdin
        request = {"what": what, "limit": limit, "log": str(self.log), **more}
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.server.stdout
        line = self.server.stdout.readline()
        return json.loads(line) if line else {}

    def judge(self, texts: dict[str, str], nearest: str, *, has_to_run: bool) -> tuple[str, str, float]:
        """(outcome, by what, seconds) with other texts in the place of files."""
        before = {file: (self.folder / file).read_text() for file in texts}
        try:
            for file, text in texts.items():
                (self.folder / file).write_text(text)
            if has_to_run and (first := self.ask("quickstart", STEP_SECONDS))["code"] != 0:
                return "no fault", "the first step of the quickstart", first["seconds"]
            found = self.ask("tests", TEST_SECONDS, paths=in_order(self.folder, nearest))
        finally:
            for file, text in before.items():
                (self.folder / file).write_text(text)
        if found["code"] == 0:
            return "survived", "", found["seconds"]
        return "caught", _failure(self.log.read_text(errors="replace"), found["code"]), found["seconds"]

    def end(self) -> None:
        self.server.kill()
        self.server.wait()


def _failure(log: str, code: int | None) -> str:
    """The test that failed, from pytest's summary."""
    if code is None:
        return f"more than {TEST_SECONDS} s"
    named = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    return named[0] if named else f"exit code {code}"


class Judged:
    """Verdicts by key, on disk after each."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about, self.lock = out, about, threading.Lock()
        self.verdicts: dict[str, Verdict] = {}
        if out.exists():
            tree = json.loads(out.read_text())
            if tree["about"]["seed"] != about["seed"]:
                raise SystemExit(f"{out} is of seed {tree['about']['seed']}, not {about['seed']}: take another --out")
            self.about["minutes"] = tree["about"]["minutes"]
            self.verdicts = {key: Verdict(**verdict) for key, verdict in tree["verdicts"].items()}

    def add(self, key: str, verdict: Verdict) -> None:
        with self.lock:
            self.verdicts[key] = verdict
            self.write()
        print(f"{verdict.outcome:>8}  {verdict.name}  {verdict.seconds:.0f} s  {verdict.by}", flush=True)

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        tree = {"about": self.about, "verdicts": {key: asdict(verdict) for key, verdict in self.verdicts.items()}}
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(tree, indent=1) + "\n")
        partial.rename(self.out)


def package_of(file: str) -> str:
    parts = Path(file).parts
    return "/".join(parts[:2]) if parts[0] == "lsys" and len(parts) > 2 else parts[0]


def drawn(seed: int, count: int) -> dict[str, tuple[int, list[Mutant]]]:
    """By package: how many faults to judge, and all of its faults in the order in which they are taken."""
    files = sorted(str(path.relative_to(ROOT)) for name in SOURCES for path in (ROOT / name).rglob("*.py"))
    texts = {file: (ROOT / file).read_text() for file in files}
    lines: dict[str, int] = {}
    found: dict[str, list[Mutant]] = {}
    for file, text in texts.items():
        lines[package_of(file)] = lines.get(package_of(file), 0) + text.count("\n")
        found.setdefault(package_of(file), []).extend(mutants(file, text))
    total = sum(lines.values())
    shares = {name: count * each / total for name, each in lines.items()}
    numbers = {name: int(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: numbers[name] - shares[name])[: count - sum(numbers.values())]:
        numbers[name] += 1
    return {name: (numbers[name], _mixed(found[name], f"{seed} {name}")) for name in sorted(numbers) if numbers[name]}


def _mixed(found: list[Mutant], seed: str) -> list[Mutant]:
    """In random order, kinds alternating: else most would be of the two or three kinds that apply everywhere."""
    generator, kinds = random.Random(seed), {mutant.kind for mutant in found}
    queues = {}
    for kind in sorted(kinds):
        queues[kind] = [mutant for mutant in found if mutant.kind == kind]
        generator.shuffle(queues[kind])
    order: list[Mutant] = []
    while queues:
        for kind in generator.sample(sorted(queues), len(queues)):
            order.append(queues[kind].pop())
            if not queues[kind]:
                del queues[kind]
    return order


def tasks(options: argparse.Namespace) -> "Queue[Known | Iterator[Mutant]]":
    """What is to be judged: known faults, and for each drawn one the faults of its package, of which the next that counts is taken."""
    queue: Queue[Known | Iterator[Mutant]] = Queue()
    if options.only != "drawn":
        for known in KNOWN:
            queue.put(known)
    if options.only != "known":
        for number, order in drawn(options.seed, options.count).values():
            source = iter(order)
            for _ in range(number):
                queue.put(source)
    return queue


def work(copy: Copy, queue: "Queue[Known | Iterator[Mutant]]", judged: Judged, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            task = queue.get_nowait()
        except Empty:
            return
        if isinstance(task, Known):
            _judge_known(copy, task, judged)
            continue
        while time.monotonic() < deadline:
            with judged.lock:
                mutant = next(task, None)
            if mutant is None or _judge_drawn(copy, mutant, judged) != "no fault":
                break


def _judge_known(copy: Copy, known: Known, judged: Judged) -> None:
    key = f"known: {known.name}"
    if key in judged.verdicts:
        return
    texts: dict[str, str] = {}
    for change in known.changes:
        text = texts.get(change.file) or (copy.folder / change.file).read_text()
        if text.count(change.old) != 1:
            raise SystemExit(
                f"{known.name}: {change.old!r} stands {text.count(change.old)} times in {change.file}; once is wanted"
            )
        texts[change.file] = text.replace(change.old, change.new)
    outcome, by, seconds = copy.judge(texts, known.changes[0].file, has_to_run=False)
    old, new = (" | ".join(getattr(change, side) for change in known.changes) for side in ("old", "new"))
    judged.add(key, Verdict(known.name, "known", old, new, outcome, by, seconds))


def _judge_drawn(copy: Copy, mutant: Mutant, judged: Judged) -> str:
    key = f"{mutant.name} {mutant.start} {mutant.new}"
    if key not in judged.verdicts:
        text = mutant.of((copy.folder / mutant.file).read_text())
        outcome, by, seconds = copy.judge({mutant.file: text}, mutant.file, has_to_run=True)
        group = package_of(mutant.file)
        judged.add(key, Verdict(mutant.name, group, mutant.old, mutant.new, outcome, by, seconds))
    return judged.verdicts[key].outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=130)
    parser.add_argument("--only", choices=["known", "drawn"], default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=55.0, help="of this part")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutations.json")
    parser.add_argument("--page", type=Path, default=None, help="write the results as a page")
    parser.add_argument("--no-control", action="store_true", help="do not run the tests without a fault first")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip():
        print("what is not committed is not in the copies", file=sys.stderr)
    about = {"seed": options.seed, "count": options.count, "commit": commit.stdout.strip(), "minutes": 0.0}
    judged = Judged(options.out, about | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"})
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    copies: list[Copy] = []
    try:
        for index in range(options.jobs):
            (folder / str(index)).mkdir()
            copies.append(Copy(folder / str(index)))
        if not options.no_control and not judged.verdicts:
            outcome, by, seconds = copies[0].judge({}, "lsys/train/engine.py", has_to_run=True)
            if outcome != "survived":
                raise SystemExit(f"without a fault, {outcome} by {by}: {copies[0].log.read_text()[-2000:]}")
            print(f"without a fault all tests pass, in {seconds:.0f} s", flush=True)
        queue, deadline = tasks(options), begun + 60 * options.minutes
        threads = [threading.Thread(target=work, args=(copy, queue, judged, deadline)) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for copy in copies:
            copy.end()
        shutil.rmtree(folder, ignore_errors=True)
        judged.about["minutes"] = round(judged.about["minutes"] + (time.monotonic() - begun) / 60, 1)
        judged.write()
    verdicts = list(judged.verdicts.values())
    if options.page:
        options.page.write_text(page(judged.about, verdicts))
    print(f"{queue.qsize()} not judged yet" if queue.qsize() else "all judged", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
