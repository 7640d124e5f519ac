"""What a gather of keys and values sends: the count of `lsys.parallel.attention.gather`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from lsys.kernels.mask import Mask
from lsys.parallel.messages.attention import Shape
from lsys.parallel.messages.heads import Groups
from lsys.parallel.messages.placement import Part, Phase, Phases, Placement, around, is_uneven, pairs_of


def between(place: Placement, groups: Groups, rows: Sequence[int], shape: Shape, mask: Mask, backend: str) -> Phases:
    """The messages; rows: elements of a token's keys and values.

    Nearly equal parts are padded and go around the ring, others directly. Gloo sums what ranks exchange directly.
    """
    assert all(len(group) == 1 for group in groups)  # the collective is one of all ranks
    sizes, ranks = offered(place, mask), place.ranks
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


def offered(place: Placement, mask: Mask) -> list[int]:
    """Tokens of each rank that some other rank needs."""
    sizes, reach = [0] * place.ranks, mask.reach()
    for parts, readers in place.crossing(mask):
        begins, following = [[part.begin for part in some] for some in readers], [_following(some) for some in readers]
        for part in parts:
            needed = 0  # of the part's last tokens
            for some, starts, next_rank in zip(readers, begins, following, strict=True):
                at = bisect_right(starts, part.begin) if mask.causal else 0
                if at < len(some) and some[at].rank == part.rank:
                    at = next_rank[at]
                if at < len(some):  # the first query of another rank that sees some of it
                    first = part.begin if reach is None else max(part.begin, starts[at] - reach)
                    needed = max(needed, part.end - first)
            sizes[part.rank] += needed
    return sizes


def _following(parts: Sequence[Part]) -> list[int]:
    """By part, the number of the next that another rank holds."""
    found = [len(parts)] * len(parts)
    for number in reversed(range(len(parts) - 1)):
        changes = parts[number + 1].rank != parts[number].rank
        found[number] = number + 1 if changes else found[number + 1]
    return found
