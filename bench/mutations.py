"""Do the tests notice? Plants faults, one at a time, and runs what `make test-fast` runs until a test fails.

    python bench/mutations.py --seed 1 --count 130 --out build/mutations.json --minutes 55 [--page docs/benchmarks/mutations.md]

Faults are (a) those that were once found to pass every test (bench/mutation_parts/known.py), single and many at once, and (b) drawn by
seed from all places where an operator of bench/mutation_parts/operators.py applies, each package in proportion to its lines. A drawn
fault that does not import, or stops the first step of the quickstart, needs no test and does not count: the next one is taken.

Each runs in a copy of the checkout of its own, in a fork of a process that has torch and Megatron loaded; nearest tests first, for 60 s.
Those that pass them are then planted all at once, in one run of all tests for each job; halves are judged by tests that failed there.
What has been judged is in --out after each fault; the same command goes on from there.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from queue import Empty, Queue
from typing import Any

from bench.common.tree import ROOT
from bench.mutation_parts.copies import Copy
from bench.mutation_parts.known import KNOWN, Known
from bench.mutation_parts.near import in_order
from bench.mutation_parts.operators import Mutant, mutants
from bench.mutation_parts.page import page

SOURCES = ("lsys", "kernels", "parallel", "launch")
STEP_SECONDS = 120  # that the first step of the quickstart may take
NEAR_SECONDS = 60  # of the nearest tests
TEST_SECONDS = 2400  # that all tests may take
WHOLE_SECONDS = 1500  # that they take
OF_A_FILE = 4  # tests that failed with many faults planted, by which fewer are judged
Place = tuple[str, int, str, str]  # file, offset in its text, old, new


@dataclass(frozen=True)
class Verdict:
    """What came of a fault: "caught" by a test, "survived", "no fault" where it needs no test, or "open" if the nearest tests passed."""

    name: str
    group: str
    old: str
    new: str
    outcome: str
    by: str
    seconds: float
    changes: tuple[tuple[str, int, str, str], ...]  # file, offset in its text, old, new


class Judged:
    """Verdicts by key, on disk after each."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        self.out, self.about, self.lock = out, about, threading.Lock()
        self.verdicts: dict[str, Verdict] = {}
        if out.is_file():
            found = self.read(out)
            if found.about["seed"] != about["seed"]:
                raise SystemExit(f"{out} is of seed {found.about['seed']}, not {about['seed']}: take another --out")
            self.about["minutes"], self.verdicts = found.about["minutes"], found.verdicts

    @classmethod
    def read(cls, path: Path) -> "Judged":
        """What a file has."""
        tree = json.loads(path.read_text())
        found = cls(Path(os.devnull), tree["about"])
        for key, verdict in tree["verdicts"].items():
            found.verdicts[key] = Verdict(**verdict | {"changes": tuple(map(tuple, verdict["changes"]))})
        return found

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


Task = Known | Iterator[Mutant] | str


def tasks(options: argparse.Namespace, judged: Judged) -> "Queue[Task]":
    """What is to be judged: known faults, and for each drawn one the faults of its package, of which the next that counts is taken; or keys of
    survivors, again."""
    queue: Queue[Task] = Queue()
    if options.again:
        for key, verdict in judged.verdicts.items():
            if verdict.outcome == "survived":
                queue.put(key)
        return queue
    if options.only != "drawn":
        for known in KNOWN:
            queue.put(known)
    if options.only != "known":
        for number, order in drawn(options.seed, options.count).values():
            source = iter(order)
            for _ in range(number):
                queue.put(source)
    return queue


def work(copy: Copy, queue: "Queue[Task]", judged: Judged, deadline: float) -> None:
    """Judge by the nearest tests what the queue has."""
    while time.monotonic() < deadline:
        try:
            task = queue.get_nowait()
        except Empty:
            return
        if isinstance(task, str):
            _judge_again(copy, task, judged)
            continue
        if isinstance(task, Known):
            key = f"known: {task.name}"
            if key not in judged.verdicts:
                judged.add(key, _near(copy, task.name, "known", _places(copy, task), has_to_run=False))
            continue
        if not _judge_next(copy, task, judged, deadline):
            queue.put(task)


def _judge_next(copy: Copy, source: Iterator[Mutant], judged: Judged, deadline: float) -> bool:
    """Judge the next fault of a package that counts; whether there was time."""
    while time.monotonic() < deadline:
        with judged.lock:
            mutant = next(source, None)
        if mutant is None:
            return True
        key = f"{mutant.name} {mutant.start} {mutant.new}"
        if key not in judged.verdicts:
            place = (mutant.file, mutant.start, mutant.old, mutant.new)
            judged.add(key, _near(copy, mutant.name, package_of(mutant.file), (place,), has_to_run=True))
        if judged.verdicts[key].outcome != "no fault":
            return True
    return False


def _judge_again(copy: Copy, key: str, judged: Judged) -> None:
    """Judge a survivor by the nearest tests as they are now; what it changes may have moved since."""
    was = judged.verdicts[key]
    moved = []
    for file, start, old, new in was.changes:
        text = copy.text(file)
        starts = [match.start() for match in re.finditer(re.escape(old), text)]
        if not starts:
            raise SystemExit(f"{key}: {old!r} is not in {file} any more")
        moved.append((file, min(starts, key=lambda place: abs(place - start)), old, new))
    now = _near(copy, was.name, was.group, tuple(moved), has_to_run=False)
    judged.add(key, now if now.outcome == "caught" else replace(was, seconds=now.seconds))


def _places(copy: Copy, known: Known) -> tuple[Place, ...]:
    """Where a known fault's changes are."""
    found = []
    for change in known.changes:
        text = copy.text(change.file)
        if text.count(change.old) != 1:
            count = text.count(change.old)
            raise SystemExit(f"{known.name}: {change.old!r} stands {count} times in {change.file}; once is wanted")
        found.append((change.file, text.index(change.old), change.old, change.new))
    return tuple(found)


def _texts(copy: Copy, places: Iterable[Place]) -> dict[str, str]:
    """Files with changes in them, which do not overlap."""
    texts: dict[str, str] = {}
    for file, start, old, new in sorted(
        places, key=lambda place: -place[1]
    ):  # from the end: what is before stays where it is
        text = texts.get(file) or copy.text(file)
        if not text.startswith(old, start):
            raise SystemExit(f"{old!r} is not at {start} of {file} any more: take another --out")
        texts[file] = text[:start] + new + text[start + len(old) :]
    return texts


def _near(copy: Copy, name: str, group: str, places: tuple[Place, ...], *, has_to_run: bool) -> Verdict:
    """A fault judged by the tests nearest to it."""
    old, new = " | ".join(place[2] for place in places), " | ".join(place[3] for place in places)
    with copy.planted(_texts(copy, places)):
        if has_to_run and not (first := copy.first_step(STEP_SECONDS)).passed:
            return Verdict(name, group, old, new, "no fault", "the first step of the quickstart", first.seconds, places)
        found = copy.tests(in_order(copy.folder, places[0][0], nearest=True), NEAR_SECONDS)
    outcome = "caught" if found.failed else "open"
    return Verdict(name, group, old, new, outcome, "".join(found.failed[:1]), found.seconds, places)


def together(copy: Copy, keys: list[str], judged: Judged, deadline: float) -> None:
    """Judge what the nearest tests passed, by all, run to the end with all faults planted at once. What fails then is what can notice one of them:
    by these tests halves are judged, and halves of those in which one fails. A fault that another hides counts as a survivor.
    """
    while keys and time.monotonic() + WHOLE_SECONDS < deadline:
        now, later, used = list[str](), list[str](), list[Place]()
        for key in keys:
            places = judged.verdicts[key].changes
            apart = all(not _overlap(place, other) for place in places for other in used)
            (now if apart else later).append(key)
            used += places if apart else ()
        _split(copy, now, in_order(copy.folder, used[0][0]), judged)
        keys = later


def _split(copy: Copy, keys: list[str], tests: Sequence[str], judged: Judged) -> None:
    """Judge faults by tests, all at once, then halves of them by those that failed."""
    with copy.planted(_texts(copy, (place for key in keys for place in judged.verdicts[key].changes))):
        found = copy.tests(tests, TEST_SECONDS, to_the_end=len(keys) > 1)
    print(f"{len(keys)} at once: {len(found.failed)} of {len(tests)} fail, {found.seconds:.0f} s", flush=True)
    is_known = found.code in (0, 1)  # else it took too long, or pytest itself failed
    if len(keys) > 1 and (found.failed or not is_known):
        for half in (keys[::2], keys[1::2]):
            _split(copy, half, _few(found.failed) if is_known else tests, judged)
        return
    for key in keys:
        outcome = "caught" if found.failed else "survived"
        seconds = judged.verdicts[key].seconds + found.seconds / len(keys)
        judged.add(
            key, replace(judged.verdicts[key], outcome=outcome, by="".join(found.failed[:1]), seconds=round(seconds, 1))
        )


def _few(tests: Sequence[str]) -> list[str]:
    """Some of each file: faults that stop everything would make hundreds of tests the judges of others."""
    count: dict[str, int] = {}
    found = []
    for test in tests:
        file = test.partition("::")[0]
        count[file] = count.get(file, 0) + 1
        if count[file] <= OF_A_FILE:
            found.append(test)
    return found


def _overlap(one: Place, other: Place) -> bool:
    return one[0] == other[0] and one[1] < other[1] + len(other[2]) and other[1] < one[1] + len(one[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=130)
    parser.add_argument("--only", choices=["known", "drawn"], default=None)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=55.0, help="of this part")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutations.json")
    parser.add_argument("--page", type=Path, default=None, help="write the results as a page")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="results of other seeds, for the page")
    parser.add_argument("--again", action="store_true", help="judge survivors anew, by tests that were written since")
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
            if (
                not copies[0].first_step(STEP_SECONDS).passed
                or not (
                    whole := copies[0].tests(in_order(copies[0].folder, "lsys/train/engine.py"), TEST_SECONDS)
                ).passed
            ):
                raise SystemExit(f"without a fault: {copies[0].log.read_text()[-2000:]}")
            print(f"without a fault all tests pass, in {whole.seconds:.0f} s", flush=True)
        queue, deadline = tasks(options, judged), begun + 60 * options.minutes
        _in_threads(copies, lambda copy: work(copy, queue, judged, deadline))
        left = [key for key, verdict in judged.verdicts.items() if verdict.outcome == "open"]
        if not queue.qsize():
            parts = {id(copy): left[index :: len(copies)] for index, copy in enumerate(copies)}
            _in_threads(copies, lambda copy: together(copy, parts[id(copy)], judged, deadline))
    finally:
        for copy in copies:
            copy.end()
        shutil.rmtree(folder, ignore_errors=True)
        judged.about["minutes"] = round(judged.about["minutes"] + (time.monotonic() - begun) / 60, 1)
        judged.write()
    verdicts = list(judged.verdicts.values())
    if options.page:
        others = [Judged.read(path) for path in options.also]
        options.page.write_text(
            page([(judged.about, verdicts), *((each.about, [*each.verdicts.values()]) for each in others)])
        )
    left = [key for key, verdict in judged.verdicts.items() if verdict.outcome == "open"]
    print(f"{queue.qsize() + len(left)} not judged yet" if queue.qsize() + len(left) else "all judged", flush=True)
    return 0


def _in_threads(copies: list[Copy], action: Callable[[Copy], None]) -> None:
    with ThreadPoolExecutor(len(copies)) as threads:
        for done in [threads.submit(action, copy) for copy in copies]:
            done.result()


if __name__ == "__main__":
    sys.exit(main())
