"""The checkout that benchmarks run from. Needs the standard library."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def with_checkout(**more: str) -> dict[str, str]:
    """This process's environment and `more`, for another that finds lsys and bench here, installed or not."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
