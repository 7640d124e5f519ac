"""Tiles: the units of attention, queries against keys inside a diagonal band; one by one, and as tables."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.kernels.mask import Mask

Derived = TypeVar("Derived")

# A bound so far from the diagonal that it binds nobody. It takes part in sums and comparisons as infinity would.
FAR = 1 << 40


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


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles as columns on the host, each int64 [tiles]. They do not change; what is planned for them is kept.

    Attributes:
        q, n: first row of the queries, and how many they are.
        k, m: the same of the keys.
        first, last: the band of `Tile`; no bound is -FAR, or FAR.
    """

    q: Tensor
    n: Tensor
    k: Tensor
    m: Tensor
    first: Tensor
    last: Tensor
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, tiles: Tiles | Iterable[Tile]) -> Tiles:
        """The table of these tiles.

        Raises:
            ValueError: rows of a tile have a step, or lack a start or stop.
        """
        if isinstance(tiles, Tiles):
            return tiles
        rows = []
        for q, k, first, last in tiles:
            for name, span in (("q", q), ("k", k)):
                if span.step is not None or None in (span.start, span.stop):
                    raise ValueError(f"rows {span} of {name} in a tile are no range with a start and a stop")
            low, high = (max(-FAR, min(bound, FAR)) for bound in (_or(first, -FAR), _or(last, FAR)))
            rows.append((q.start, q.stop - q.start, k.start, k.stop - k.start, low, high))
        return cls(*torch.tensor(rows, dtype=torch.int64).reshape(-1, 6).unbind(1))

    @classmethod
    def joined(cls, tables: Sequence[Tiles]) -> Tiles:
        """The tiles of all tables, in turn."""
        return cls(*map(torch.cat, zip(*(table.columns for table in tables), strict=True)))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All columns, in order."""
        return self.q, self.n, self.k, self.m, self.first, self.last

    def __len__(self) -> int:
        return len(self.q)

    def __iter__(self) -> Iterator[Tile]:
        for q, n, k, m, first, last in zip(*(column.tolist() for column in self.columns), strict=True):
            low, high = None if first == -FAR else first, None if last == FAR else last
            yield Tile(slice(q, q + n), slice(k, k + m), low, high)

    def take(self, which: Tensor) -> Tiles:
        """The tiles with these numbers, in their order; or those where a mask, bool [tiles], is true."""
        numbers = which.nonzero().flatten() if which.dtype == torch.bool else which
        return Tiles(*(column.index_select(0, numbers) for column in self.columns))

    @cached_property
    def has_lower_bound(self) -> bool:
        """Whether some tile has a lower bound: a window."""
        return bool((self.first > -FAR).any())

    def check(self, queries: int, keys: int) -> None:
        """That the rows of all tiles are among so many rows of q and k.

        Raises:
            ValueError: they are not.
        """
        for name, needed, total in zip("qk", self._needed, (queries, keys), strict=True):
            if needed > total:
                raise ValueError(f"the tiles need {needed} rows of {name}, which has {total}")

    @cached_property
    def _needed(self) -> tuple[int, int]:
        """So many rows q and k must have."""
        needed = []
        for name, begin, number in (("q", self.q, self.n), ("k", self.k, self.m)):
            wrong = (begin < 0) | (number < 0)
            if wrong.any():
                at = int(wrong.nonzero()[0])
                raise ValueError(f"rows {int(begin[at])} to {int((begin + number)[at])} of {name} are no range")
            needed.append(int((begin + number).max()) if len(begin) else 0)
        return needed[0], needed[1]

    def derived(self, name: Hashable, build: Callable[[], Derived]) -> Derived:
        """What depends on these tiles: built when first wanted, then kept as `name`."""
        if name not in self._derived:
            self._derived[name] = build()
        return self._derived[name]

    def trimmed(self) -> Tiles:
        """The same pairs of queries and keys, in tiles where each query sees a key, each key is seen, each bound binds."""
        low, high = (-self.last).clamp(min=0), torch.minimum(self.n, self.m - self.first)  # queries that see a key
        start, stop = (low + self.first).clamp(min=0), torch.minimum(self.m, high + self.last)  # keys that are seen
        first, last, n, m = self.first + low - start, self.last + low - start, high - low, stop - start
        first = first.masked_fill(n - 1 + first <= 0, -FAR)
        last = last.masked_fill(last >= m - 1, FAR)
        left = (n > 0) & (m > 0) & (self.first <= self.last)
        tiles = Tiles(self.q + low, n, self.k + start, m, first, last)
        return tiles if bool(left.all()) else tiles.take(left)


def _or(bound: int | None, none: int) -> int:
    return none if bound is None else bound


def sequences(lengths_q: Tensor, lengths_k: Tensor, mask: Mask) -> Tiles:
    """A tile for each packed sequence, which sees itself alone; causal queries stand at the last positions of their keys."""
    none = torch.full_like(lengths_q, FAR)
    first, last = mask.band(lengths_k - lengths_q)
    starts = (lengths.cumsum(0) - lengths for lengths in (lengths_q, lengths_k))
    first, last = -none if first is None else first, none if last is None else last
    return Tiles(next(starts), lengths_q, next(starts), lengths_k, first, last)


class Batches(NamedTuple):
    """Tiles in batches: batch b is the tiles bounds[b] to bounds[b + 1]."""

    tiles: Tiles
    bounds: Tensor


def batches(tiles: Tiles, keys: Sequence[Tensor], most: Tensor | None = None) -> Batches:
    """As few batches as possible of which none holds a query twice, each of tiles alike in these keys.

    Args:
        tiles: trimmed.
        keys: int64 [tiles] each.
        most: of each tile, how many of its kind a batch may hold: int64 [tiles], alike where all keys are.

    Returns:
        The tiles, sorted, those of a batch by their queries.
    """
    if len(tiles) == 1:  # one long document has no more in each step of a ring
        return Batches(tiles, torch.tensor([0, 1]))
    order = torch.arange(len(tiles))
    for key in (tiles.q, *reversed(keys)):
        order = order[key[order].argsort(stable=True)]
    tiles, kind = tiles.take(order), _groups([key[order] for key in keys])
    wave = _waves(kind, tiles)
    if wave.any():
        kind = kind * (wave.max() + 1) + wave
        again = kind.argsort(stable=True)
        tiles, kind, order = tiles.take(again), _groups([kind[again]]), order[again]
    if most is not None:
        place = torch.arange(len(tiles)) - torch.searchsorted(kind, kind)  # in its batch
        kind = _groups([kind, place // most[order]])
    numbers = torch.arange(int(kind[-1]) + 2 if len(kind) else 1)
    return Batches(tiles, torch.searchsorted(kind, numbers))


def _groups(keys: Sequence[Tensor]) -> Tensor:
    """Sorted by the keys; the number of the run of equal keys that each is in: int64 [n]."""
    changes = (torch.stack([*keys]).diff() != 0).any(0)
    return F.pad(changes.cumsum(0), (1, 0))[: len(keys[0])]


def _waves(kind: Tensor, tiles: Tiles) -> Tensor:
    """A number for each tile, so that no two with the same number and kind share a query; as few as possible.

    They are sorted by kind and first query: first fit is optimal (interval graphs).
    """
    wave = torch.zeros_like(kind)
    if len(kind) == 0:
        return wave
    shift = kind * int((tiles.q + tiles.n).max())  # no kind shares a query with another
    begin, end = tiles.q + shift, tiles.q + tiles.n + shift
    rest, number = torch.arange(len(kind)), 0
    while (begin[rest[1:]] < end[rest[:-1]]).any():
        chosen = _chain(torch.searchsorted(begin[rest], end[rest]))  # each is followed by the next that is free of it
        wave[rest[~chosen]] = number = number + 1
        rest = rest[~chosen]
    return wave


def _chain(following: Tensor) -> Tensor:
    """Which numbers one meets from 0 on, if following[i] > i comes after i: bool [n]. By doubling, in log n rounds."""
    n = len(following)
    met, jump = torch.zeros(n + 1, dtype=torch.bool), torch.cat([following, torch.tensor([n])])
    met[0] = True
    for _ in range(n.bit_length()):
        met[jump[met]] = True
        jump = jump[jump]
    return met[:n]
