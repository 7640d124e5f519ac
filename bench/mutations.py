"""Do the tests notice? Plants faults, one at a time, and runs what `make test-fast` runs until a test fails.

    python bench/mutations.py --seed 1 --count 130 --out build/mutations.json --minutes 55 [--page docs/benchmarks/mutations.md]

Faults are (a) those that were once found to pass every test (bench/mutation_parts/known.py), single and many at once, and (b) drawn by
seed from all places where an operator of bench/mutation_parts/operators.py applies, each package in proportion to its lines. A drawn
fault that does not import, or stops the first step of the quickstart, needs no test and does not count: the next one is taken.

Each runs in a copy of the checkout of its own, in a fork of a process that has torch and Megatron loaded; nearest tests first, for 60 s.
Those that pass them are then planted all at once, in one run of all tests over all copies; halves are judged by tests that failed there.
Before it all, tests run without a fault: all have to pass, and what each takes, kept beside --out, tells later which one does not end.
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
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, Queue

from bench.common.tree import ROOT
from bench.mutation_parts.copies import Copy, Place
from bench.mutation_parts.known import KNOWN, Known
from bench.mutation_parts.near import in_order
from bench.mutation_parts.operators import Mutant, mutants
from bench.mutation_parts.page import page
from bench.mutation_parts.together import TEST_SECONDS, together
from bench.mutation_parts.verdicts import Judged, Verdict

SOURCES = ("lsys", "kernels", "parallel", "launch")
STEP_SECONDS = 120  # that the first step of the quickstart may take
NEAR_SECONDS = 60  # of the nearest tests
WHOLE_SECONDS = 1500  # that all tests and halves of faults take, on two cores
# A known fault, those of a package in their order, or the key of one that was judged before.
Task = Known | Iterator[Mutant] | str


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


def tasks(options: argparse.Namespace, judged: Judged) -> "Queue[Task]":
    """What is to be judged: known faults, and for each drawn one the faults of its package, of which the next that counts is taken; or keys of
    those that no test caught, again."""
    queue: Queue[Task] = Queue()
    if options.again:
        for key in judged.of("survived", "open"):
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
    """Judge by the nearest tests as they are now what no test caught; what it changes may have moved since."""
    was = judged.verdicts[key]
    moved = []
    for file, start, old, new in was.changes:
        text = copy.text(file)
        starts = [match.start() for match in re.finditer(re.escape(old), text)]
        if not starts:
            raise SystemExit(f"{key}: {old!r} is not in {file} any more")
        moved.append((file, min(starts, key=lambda place: abs(place - start)), old, new))
    judged.add(key, _near(copy, was.name, was.group, tuple(moved), has_to_run=False))


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


def _near(copy: Copy, name: str, group: str, places: tuple[Place, ...], *, has_to_run: bool) -> Verdict:
    """A fault judged by the tests nearest to it."""
    old, new = " | ".join(place[2] for place in places), " | ".join(place[3] for place in places)
    with copy.planted(places):
        if has_to_run and not (first := copy.first_step(STEP_SECONDS)).passed:
            return Verdict(name, group, old, new, "no fault", "the first step of the quickstart", first.seconds, places)
        found = copy.tests(in_order(copy.folder, places[0][0], nearest=True), NEAR_SECONDS)
    return Verdict(name, group, old, new, "caught" if found.notices else "open", found.by, found.seconds, places)


def usual(copies: Sequence[Copy], file: Path, commit: str) -> dict[str, float]:
    """Seconds of each test without a fault, by name, kept in a file for the commit; SystemExit where one fails."""
    if file.is_file() and (tree := json.loads(file.read_text()))["commit"] == commit:
        return dict(tree["seconds"])
    tests, seconds = in_order(copies[0].folder, "lsys/train/engine.py"), dict[str, float]()
    if not copies[0].first_step(STEP_SECONDS).passed:
        raise SystemExit(f"without a fault: {copies[0].log.read_text()[-2000:]}")

    def run(copy: Copy) -> None:
        found = copy.tests(tests[copies.index(copy) :: len(copies)], TEST_SECONDS, to_the_end=True)
        if not found.passed:
            raise SystemExit(f"without a fault {found.failed} fail: {copy.log.read_text()[-2000:]}")
        seconds.update(found.of_tests)

    _in_threads(copies, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"commit": commit, "seconds": seconds}))
    print(f"without a fault all {len(seconds)} tests pass, in {sum(seconds.values()):.0f} s", flush=True)
    return seconds


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
    parser.add_argument(
        "--again", action="store_true", help="judge anew what no test caught, by tests that were written since"
    )
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout.strip():
        print("what is not committed is not in the copies", file=sys.stderr)
    about = {"seed": options.seed, "count": options.count, "commit": commit.stdout.strip(), "minutes": 0.0}
    judged = Judged(options.out, about | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}, options.again)
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    copies: list[Copy] = []
    try:
        for index in range(options.jobs):
            (folder / str(index)).mkdir()
            copies.append(Copy(folder / str(index)))
        seconds = usual(copies, options.out.with_suffix(".seconds.json"), about["commit"])
        for copy in copies:
            copy.usual = seconds
        queue, deadline = tasks(options, judged), begun + 60 * options.minutes
        _in_threads(copies, lambda copy: work(copy, queue, judged, deadline))
        if not queue.qsize() and time.monotonic() + WHOLE_SECONDS < deadline:
            together(copies, judged.of("open"), judged)
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
    left = judged.of("open")
    print(f"{queue.qsize() + len(left)} not judged yet" if queue.qsize() + len(left) else "all judged", flush=True)
    return 0


def _in_threads(copies: Sequence[Copy], action: Callable[[Copy], None]) -> None:
    with ThreadPoolExecutor(len(copies)) as threads:
        for done in [threads.submit(action, copy) for copy in copies]:
            done.result()


if __name__ == "__main__":
    sys.exit(main())
