"""What sections share: their random numbers, and what they give."""

import random
from typing import Any


def drawn(seed: int, section: str) -> random.Random:
    """The random numbers of a section: others for each, whichever run before it."""
    return random.Random(f"{seed} {section}")


def outcome(cases: list[dict[str, Any]], said: str, **more: Any) -> dict[str, Any]:
    """What a section gives: its cases, each with `good`, and `text` where it is not; how many are good; one sentence."""
    return {"cases": cases, "of": len(cases), "good": sum(case["good"] for case in cases), "said": said, **more}
