"""Faults that the nearest tests passed, judged by all tests: one run of all with many planted at once, then halves of them by what failed."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from queue import Queue

from bench.mutation_parts.copies import Copy, Place
from bench.mutation_parts.near import in_order
from bench.mutation_parts.verdicts import Judged

TEST_SECONDS = 2400  # that all tests may take
OF_A_FILE = 4  # tests that failed with many faults planted, by which fewer are judged
Part = tuple[list[str], Sequence[str]]  # keys of faults, and the tests to judge them by


def together(copies: Sequence[Copy], keys: list[str], judged: Judged) -> None:
    """Judge what the nearest tests passed, by all, run to the end with all faults planted at once. What fails then is what can notice one of them:
    by these tests halves are judged, and halves of those in which one fails. Another fault may have hidden one that survives, or have made more tests
    of a file fail than are judges: survivors are planted at once again, until of a round nothing is caught.
    """
    while keys:
        _round(copies, keys, judged)
        left = [key for key in keys if judged.verdicts[key].outcome == "survived"]
        keys = left if len(left) < len(keys) else []


def _round(copies: Sequence[Copy], keys: list[str], judged: Judged) -> None:
    while keys:
        now, later, used = list[str](), list[str](), list[Place]()
        for key in keys:
            places = judged.verdicts[key].changes
            apart = all(not _overlap(place, other) for place in places for other in used)
            (now if apart else later).append(key)
            used += places if apart else ()
        _halve(copies, _by_all(copies, now, judged), judged)
        keys = later


def _by_all(copies: Sequence[Copy], keys: list[str], judged: Judged) -> list[Part]:
    """The parts to judge, by a run of all tests, divided over the copies, with all these faults planted."""
    places = [place for key in keys for place in judged.verdicts[key].changes]
    tests = in_order(copies[0].folder, places[0][0])
    parts = [tests[index :: len(copies)] for index in range(len(copies))]

    def run(copy: Copy, part: Sequence[str]) -> Sequence[str]:
        """Tests that failed, or all where that is not known."""
        with copy.planted(places):
            found = copy.tests(part, TEST_SECONDS, to_the_end=True)
        print(f"{len(keys)} at once: {len(found.failed)} fail, {found.seconds:.0f} s", flush=True)
        return found.failed if found.has_ended else part

    with ThreadPoolExecutor(len(copies)) as threads:
        failed = [name for names in threads.map(run, copies, parts) for name in names]
    return _parts(keys, failed, judged)


def _halve(copies: Sequence[Copy], todo: list[Part], judged: Judged) -> None:
    """Judge parts, and the halves of those that fail, with as many at once as there are copies."""
    free: Queue[Copy] = Queue()
    for copy in copies:
        free.put(copy)

    def run(keys: list[str], tests: Sequence[str]) -> list[Part]:
        copy = free.get()
        try:
            with copy.planted(place for key in keys for place in judged.verdicts[key].changes):
                found = copy.tests(tests, TEST_SECONDS, to_the_end=len(keys) > 1)
        finally:
            free.put(copy)
        if len(keys) > 1:
            print(f"{len(keys)} at once: {len(found.failed)} of {len(tests)} fail, {found.seconds:.0f} s", flush=True)
            return _parts(keys, found.failed if found.has_ended else tests, judged)
        outcome = "caught" if found.notices else "survived" if found.has_ended else "open"
        _tell(keys[0], outcome, found.by, found.seconds, judged)
        return []

    with ThreadPoolExecutor(len(copies)) as threads:
        running: set[Future[list[Part]]] = set()
        while todo or running:
            running |= {threads.submit(run, *part) for part in todo}
            done, running = wait(running, return_when=FIRST_COMPLETED)
            todo = [part for each in done for part in each.result()]


def _parts(keys: list[str], failed: Sequence[str], judged: Judged) -> list[Part]:
    """The halves to judge by tests that failed; where none did, all survived."""
    if not failed:
        for key in keys:
            _tell(key, "survived", "", 0.0, judged)
        return []
    return [(half, _few(failed)) for half in (keys[::2], keys[1::2]) if half]


def _tell(key: str, outcome: str, by: str, seconds: float, judged: Judged) -> None:
    verdict = judged.verdicts[key]
    judged.add(key, replace(verdict, outcome=outcome, by=by, seconds=round(verdict.seconds + seconds, 1)))


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
