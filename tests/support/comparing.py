"""The largest of several differences, of which none is lost that is no number."""

import math
from collections.abc import Iterable


def largest(differences: Iterable[float]) -> float:
    """The largest, 0 of none, NaN if any is NaN: `max` drops a NaN that is not the first, and what it gives passes any bound."""
    found = [float(difference) for difference in differences]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)
