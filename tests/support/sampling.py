"""Which cases of slow tests a quick run of everything takes: another part at each commit, all of them over ONE_IN commits."""

import hashlib
import subprocess
from pathlib import Path

ONE_IN = 4


def left_out(names: list[str], part: int) -> set[str]:
    """Cases that a part leaves out: of ONE_IN parts in a row, each case is in exactly one.

    A test's cases are numbered in the order of their digests, from a number of the test's own, so that each part has about as many of
    every test, neighbours in a table of parameters are in different ones, and the cases of other tests change nothing.

    Args:
        names: of tests, with their parameters in brackets, as pytest writes them.
    """
    tests: dict[str, list[str]] = {}
    for name in names:
        tests.setdefault(name.partition("[")[0], []).append(name)
    return {
        case
        for test, cases in tests.items()
        for number, case in enumerate(sorted(cases, key=_digest), _digest(test))
        if number % ONE_IN != part % ONE_IN
    }


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def commits(folder: Path) -> int:
    """What the part is chosen by: how many commits there are up to this one, merged branches counted as one each; 0 without git.

    In a shallow clone, whose commits cannot be counted, the day of the commit takes their place.
    """
    if _git(folder, "rev-parse", "--is-shallow-repository") == "true":
        return int(_git(folder, "log", "-1", "--format=%ct") or 0) // (24 * 3600)
    return int(_git(folder, "rev-list", "--count", "--first-parent", "HEAD") or 0)


def _git(folder: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
