"""Tiles: the units of attention, queries against keys inside a diagonal band."""

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple


class Tile(NamedTuple):
    """Queries `q` against keys `k`, restricted to a diagonal band.

    Query i of the tile (from 0) sees its key j (from 0) if i + first <= j <= i + last; None is no bound. With n queries
    and m keys: both None is full attention; last = m - n is causal with the queries at the last positions of the keys;
    a window of w adds first = last - w + 1; first alone is a window that reaches into keys before all queries. Queries
    that see nothing, keys that nobody sees, and n or m of 0 are allowed.
    """

    q: slice
    k: slice
    first: int | None = None
    last: int | None = None


def sequences(lengths_q: list[int], lengths_k: list[int], causal: bool, window: int | None) -> list[Tile]:
    """A tile per packed sequence; causal queries stand at the last positions of their keys."""
    tiles = []
    starts_q, starts_k = accumulate(lengths_q, initial=0), accumulate(lengths_k, initial=0)
    for a, b, n, m in zip(starts_q, starts_k, lengths_q, lengths_k, strict=False):
        last = m - n if causal else None
        first = None if window is None else m - n - window + 1
        tiles.append(Tile(slice(a, a + n), slice(b, b + m), first, last))
    return tiles


def trim(tiles: Iterable[Tile]) -> list[Tile]:
    """The same pairs of queries and keys, in tiles where each query sees a key, each key is seen, each bound binds."""
    return [trimmed for tile in tiles if (trimmed := _trim(tile)) is not None]


def _trim(tile: Tile) -> Tile | None:
    (q, k, first, last), n, m = tile, tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
    if first is None and last is None:
        return tile if n > 0 and m > 0 else None
    low, high, start, stop = 0, n, 0, m  # queries [low, high) see keys [start, stop)
    if last is not None:
        low = max(0, -last)
    if first is not None:
        high = min(n, m - first)
        start = max(0, low + first)
    if last is not None:
        stop = min(m, high + last)
    if low >= high or start >= stop or (first is not None and last is not None and first > last):
        return None
    if first is not None:
        first += low - start
        first = first if high - low - 1 + first > 0 else None
    if last is not None:
        last += low - start
        last = last if last < stop - start - 1 else None
    return Tile(slice(q.start + low, q.start + high), slice(k.start + start, k.start + stop), first, last)


def waves(tiles: list[Tile]) -> list[list[Tile]]:
    """The tiles in as few groups as possible of which none holds a query twice, each in the order of the queries."""
    groups: list[list[Tile]] = []
    for tile in sorted(tiles, key=lambda tile: tile.q.start):
        for group in groups:
            if group[-1].q.stop <= tile.q.start:
                group.append(tile)
                break
        else:
            groups.append([tile])
    return groups
