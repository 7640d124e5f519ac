"""What a query of attention sees, as one object: how far back, whether ahead, and which other documents. Needs no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol


class Documents(Protocol):
    """Which documents of a pack see which, and where they stand to each other.

    Equal ones compare and hash equal: what is planned is kept by them. `KINDS` lists all.
    """

    def readers(self, document: int) -> tuple[int, int]:
        """The documents [first, stop) that see this one: itself, which is the first, and any that follow it."""

    def origin(self, document: int, lengths: Sequence[int]) -> int:
        """Where the document's first token stands; a document and those that see it count from the same place.

        Another that sees it stands behind all of it.
        """

    def check(self, documents: int) -> None:
        """That a pack may have so many documents.

        Raises:
            ValueError: it may not.
        """


@dataclass(frozen=True)
class Own:
    """Each document sees itself alone."""

    def readers(self, document: int) -> tuple[int, int]:
        return document, document + 1

    def origin(self, document: int, lengths: Sequence[int]) -> int:
        return 0

    def check(self, documents: int) -> None:
        pass


@dataclass(frozen=True)
class SharedPrefix:
    """Documents in groups of which all see the first, their prefix, and themselves: answers to one prompt, packed once.

    Each of the others stands right after the prefix, as if it followed it alone: its token p at the prefix's length + p.

    Attributes:
        groups: how many documents each group has, its prefix among them; a document by itself is a group of one.
    """

    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))  # a list does not hash
        if any(number < 1 for number in self.groups):
            raise ValueError(f"a group has a prefix at least, which is one document; got groups of {self.groups}")

    @cached_property
    def _prefixes(self) -> list[int]:
        """Number of the first document of each group, then of documents."""
        return [0, *accumulate(self.groups)]

    def readers(self, document: int) -> tuple[int, int]:
        group = bisect_right(self._prefixes, document) - 1
        is_prefix = document == self._prefixes[group]
        return document, self._prefixes[group + 1] if is_prefix else document + 1

    def origin(self, document: int, lengths: Sequence[int]) -> int:
        prefix = self._prefixes[bisect_right(self._prefixes, document) - 1]
        return 0 if document == prefix else lengths[prefix]

    def check(self, documents: int) -> None:
        if self._prefixes[-1] != documents:
            groups = f"{len(self.groups)} groups have {self._prefixes[-1]} documents"
            raise ValueError(f"{groups} and the pack {documents}; each document is in one group, alone if need be")


KINDS: tuple[type[Documents], ...] = (Own, SharedPrefix)


class Sight(NamedTuple):
    """A document that another one sees, or itself: the reader's first token stands `distance` behind the document's."""

    document: int
    reader: int
    distance: int


@dataclass(frozen=True)
class Mask:
    """What a query sees of the documents that its own sees. Equal masks hash equal: plans are kept by them.

    Attributes:
        causal: a query sees keys up to where it stands; otherwise all.
        window: w limits a causal query at place p to the places p - w + 1 to p; None: all up to p.
        documents: which documents a document sees.

    Raises:
        ValueError: a window of no token, or one that is not causal.
    """

    causal: bool = True
    window: int | None = None
    documents: Documents = Own()

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(
                f"a window is of 1 token or more and causal; got window={self.window}, causal={self.causal}"
            )

    @classmethod
    def of(cls, mask: Mask | None, causal: bool, window: int | None) -> Mask:
        """The mask, or else one of documents that see themselves alone.

        Raises:
            ValueError: both are given.
        """
        if mask is None:
            return cls(causal, window)
        if not causal or window is not None:
            raise ValueError(f"causal={causal}, window={window} beside {mask}; give them to the mask")
        return mask

    @property
    def is_own(self) -> bool:
        """Whether each document sees itself alone."""
        return self.documents == Own()

    def reach(self) -> int | None:
        """How many tokens back a query sees, itself not counted; None: all."""
        return None if self.window is None else self.window - 1

    def band(self, past: Any) -> tuple[Any, Any]:
        """(first, last): query i sees the keys j with i + first <= j <= i + last; None is no bound.

        past: how far query 0 stands behind key 0, an integer or a tensor of them, as the bounds are then.
        """
        reach = self.reach()
        return None if reach is None else past - reach, past if self.causal else None

    def readers(self, document: int) -> tuple[int, int]:
        """The documents [first, stop) that see this one, itself among them."""
        return self.documents.readers(document)

    def sights(self, lengths: Sequence[int]) -> list[Sight]:
        """All documents with those that see them, in the order of both.

        Raises:
            ValueError: a pack of so many documents is none of this mask, or another document stands not behind one that
                it sees.
        """
        self.documents.check(len(lengths))
        origin = [self.documents.origin(document, lengths) for document in range(len(lengths))]
        found = []
        for document in range(len(lengths)):
            for reader in range(*self.readers(document)):
                distance = origin[reader] - origin[document]
                if reader != document and (reader < document or distance < lengths[document]):
                    where = f"whose {lengths[document]} tokens begin {distance} before it"
                    raise ValueError(f"document {reader} sees document {document}, {where}; it must follow all of them")
                found.append(Sight(document, reader, distance))
        return found

    def visible(self, first: int, stop: int, keys: int) -> int:
        """Pairs of a query at one of the places [first, stop) and a key at one of [0, keys) that it sees."""
        if not self.causal:
            return (stop - first) * keys

        def up_to(place: int) -> int:  # pairs of the queries before it, each with all keys that are not after it
            inside = max(0, min(place, keys))
            return inside * (inside + 1) // 2 + max(0, place - keys) * keys

        far = 0 if self.window is None else up_to(stop - self.window) - up_to(first - self.window)
        return up_to(stop) - up_to(first) - far


CAUSAL = Mask()  # whole documents, each alone
