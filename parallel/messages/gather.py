"""What a gather of keys and values sends: the count of `lsys.parallel.attention.gather`."""

from __future__ import annotations

from collections.abc import Sequence

from lsys.parallel.messages.attention import Shape
from lsys.parallel.messages.heads import Groups
from lsys.parallel.messages.placement import Phase, Phases, Placement, around, is_uneven, pairs_of


def between(
    place: Placement, groups: Groups, rows: Sequence[int], shape: Shape, window: int | None, backend: str
) -> Phases:
    """The messages; rows: numbers of a token's keys and values.

    Nearly equal parts are padded and go around the ring, others directly. Gloo sums what ranks exchange directly.
    """
    assert all(len(group) == 1 for group in groups)  # the collective is one of all ranks
    sizes, ranks = offered(place, window), place.ranks
    if not any(sizes):
        return Phases([], [])
    row, uneven = rows[0], is_uneven(sizes)
    if uneven:
        forward: list[Phase] = [[(i, j, sizes[i] * row * shape.itemsize) for i, j in pairs_of(ranks)]]
    else:
        forward = around((ranks - 1) * max(sizes) * row * shape.itemsize, ranks)
    if uneven or backend == "gloo":
        home: list[Phase] = [[(i, j, sizes[j] * row * shape.wide) for i, j in pairs_of(ranks)]]
    else:
        home = around((ranks - 1) * max(sizes) * row * shape.wide, ranks)
    return Phases(forward, [*forward, *home])


def offered(place: Placement, window: int | None = None) -> list[int]:
    """Tokens of each rank that some other rank needs."""
    sizes = [0] * place.ranks
    for parts in place.documents:
        following = None  # the first query of another rank after a part
        for number in reversed(range(len(parts))):
            part = parts[number]
            if number + 1 < len(parts) and parts[number + 1].rank != part.rank:
                following = parts[number + 1].begin
            if following is not None:
                first = part.begin if window is None else max(part.begin, following - window + 1)
                sizes[part.rank] += max(0, part.end - first)
    return sizes
