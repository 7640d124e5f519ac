"""Which cases of slow tests a quick run of everything takes: other ones at each commit."""

import random
import subprocess
from pathlib import Path

ONE_IN = 6


def left_out(names: list[str], seed: str) -> set[str]:
    """Cases that the sample of a seed leaves out; it keeps one in ONE_IN of each test, and one at least.

    Args:
        names: of tests, with their parameters in brackets, as pytest writes them.
    """
    tests: dict[str, list[str]] = {}
    for name in names:
        tests.setdefault(name.partition("[")[0], []).append(name)
    kept = {
        case
        for test, cases in tests.items()
        for case in random.Random(seed + test).sample(cases, -(-len(cases) // ONE_IN))
    }
    return set(names) - kept


def commit(folder: Path) -> str:
    """What the sample is drawn by; "0" without git."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return found.stdout.strip() or "0"
