"""The endless, shuffled, blended stream of documents, cut anywhere in logarithmic time.

Each corpus is shuffled anew every epoch; its own stream is its documents in that order, epoch after epoch. A document that starts at token s of the
stream of a corpus with share w has the key s / w; the blend is all documents by key. So at every point each corpus has given its share of tokens,
to within one document. Everything is a pure function of (seed, lengths, weights): nothing is stored, and no number of ranks matters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lsys.data.corpus import Corpus, CorpusError


class Piece(NamedTuple):
    """Tokens [offset, offset + length) of a document of a source."""

    source: int
    document: int
    offset: int
    length: int


class Epoch(NamedTuple):
    """One pass over a source.

    Attributes:
        order: documents in order. starts: where each begins, counted from the start of the source's stream. keys: starts / share.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    keys: NDArray[np.float64]


class _Source:
    """One corpus's own endless stream of documents.

    Every comparison is of the rounded keys that an epoch holds: a start compared with key * share would round differently, and
    documents of equal key would then change places with where one begins to read.
    """

    def __init__(self, lengths: NDArray[np.int64], share: float, seed: int, index: int) -> None:
        self.lengths, self.share, self.seed, self.index = lengths, share, seed, index
        self.tokens, self.longest = int(lengths.sum()), int(lengths.max())
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    def _epoch(self, number: int) -> Epoch:
        key = np.random.SeedSequence((self.seed, self.index, number))
        order = np.random.Generator(np.random.Philox(key)).permutation(np.flatnonzero(self.lengths))
        lengths = self.lengths[order]
        starts = lengths.cumsum() - lengths + number * self.tokens
        return Epoch(order, starts, starts / self.share)

    def _epoch_before(self, key: float) -> int:
        """An epoch that begins before `key`, at most two epochs earlier."""
        return max(0, int(key * self.share // self.tokens) - 1)

    def before(self, key: float) -> int:
        """Tokens of the documents whose key is below `key`."""
        number = self._epoch_before(key)
        while (count := int(np.searchsorted(self.epoch(number).keys, key))) == len(self.epoch(number).keys):
            number += 1
        return int(self.epoch(number).starts[count])

    def documents(self, begin: float, end: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Keys [n] in [begin, end), ascending, and their documents [n]."""
        number, keys, documents = self._epoch_before(begin), [np.empty(0)], [np.empty(0, np.int64)]
        while (epoch := self.epoch(number)).keys[0] < end:
            first, last = np.searchsorted(epoch.keys, (begin, end))
            keys.append(epoch.keys[first:last])
            documents.append(epoch.order[first:last])
            number += 1
        return np.concatenate(keys), np.concatenate(documents)


class DocumentStream:
    """The blend of several sources.

    Args:
        sources: (document lengths int64 [N], weight) of each.
        seed: of the order of documents.

    Raises:
        ValueError: no source, a source without tokens, or a weight that is not positive.
    """

    def __init__(self, sources: Sequence[tuple[NDArray[np.int64], float]], seed: int) -> None:
        if not sources:
            raise ValueError("a stream needs at least one source")
        total = sum(weight for _, weight in sources)
        for index, (lengths, weight) in enumerate(sources):
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"source {index} has weight {weight}; weights are positive: leave the source out instead"
                )
            if lengths.sum() == 0:
                raise ValueError(f"source {index} has no tokens; leave it out, or lower data.validation_fraction")
        self.sources = [_Source(lengths, weight / total, seed, i) for i, (lengths, weight) in enumerate(sources)]

    @property
    def epoch_tokens(self) -> int:
        """Tokens of all sources, each counted once."""
        return sum(source.tokens for source in self.sources)

    def pieces(self, start: int, count: int) -> list[Piece]:
        """The parts of documents that make tokens [start, start + count) of the stream, in order."""
        begin, end = self._key_at(start), start + count + 1.0  # below a key t, there are at least t tokens
        parts = [source.documents(begin, end) for source in self.sources]
        keys, documents = (np.concatenate(each) for each in zip(*parts, strict=True))
        index = np.repeat(np.arange(len(parts)), [len(part) for part, _ in parts])
        lengths = np.concatenate([s.lengths[part] for s, (_, part) in zip(self.sources, parts, strict=True)])
        order = np.lexsort((index, keys))  # by key, then source; stable within one
        index, documents, lengths = index[order], documents[order], lengths[order]
        at = sum(source.before(begin) for source in self.sources)  # where documents from `begin` on start
        starts = at + lengths.cumsum() - lengths
        first, last = np.maximum(start - starts, 0), np.minimum(start + count - starts, lengths)
        rows = np.stack((index, documents, first, last - first), 1)[first < last]
        return [Piece(*row) for row in rows.tolist()]

    def _key_at(self, start: int) -> float:
        """A key such that all documents below it end at or before `start`, and few documents lie between.

        Below a key t each source has given at least its share of t tokens, and less than one document more; so the search is short.
        """
        low = max(0.0, float(start - sum(source.longest for source in self.sources)))
        high = float(start) + 1.0
        while high - low > 0.5:
            middle = (low + high) / 2
            if sum(source.before(middle) for source in self.sources) <= start:
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class PackedTokens:
    """Consecutive tokens of the stream.

    Attributes:
        lengths: tokens of each document (or part of one), int64 [D]. pieces: where they are from, one for each length.
        tokens, targets: int64 [T]; the target of a token is the next one of its document, also where that lies beyond this pack.
        loss_mask: fp32 [T]; 0 where there is no target (a document's last token) or where the corpus masks the target.
    """

    lengths: NDArray[np.int64]
    pieces: list[Piece]
    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.float32]


class TokenStream:
    """The stream of one split of several corpora, as tokens.

    Args:
        corpora, weights: what is blended. seed: of the order.
        split: "train" or "validation": disjoint documents.
        validation_fraction: share of each corpus's documents that is held out.
    """

    def __init__(
        self, corpora: Sequence[Corpus], weights: Sequence[float], *, seed: int, split: str, validation_fraction: float
    ) -> None:
        if split not in ("train", "validation"):
            raise ValueError(f"split {split!r} is neither train nor validation")
        self.corpora = list(corpora)
        held = split == "validation"
        self.documents = [split_documents(c.documents, validation_fraction, seed)[held] for c in corpora]
        sources = [(c.lengths[ids], w) for c, ids, w in zip(corpora, self.documents, weights, strict=True)]
        for corpus, (lengths, _) in zip(corpora, sources, strict=True):
            if lengths.sum() == 0:
                raise CorpusError(
                    f"{corpus.prefix} has no tokens for {split}: {corpus.documents} documents, data.validation_fraction "
                    f"{validation_fraction}; change the fraction, or add documents"
                )
        self.stream = DocumentStream(sources, seed)

    @property
    def epoch_tokens(self) -> int:
        return self.stream.epoch_tokens

    def batch(self, start: int, count: int) -> PackedTokens:
        """Tokens [start, start + count) of the stream."""
        pieces = self.stream.pieces(start, count)
        tokens, targets = np.empty(count, np.int64), np.zeros(count, np.int64)
        mask = np.ones(count, np.float32)
        at = 0
        for source, index, offset, length in pieces:
            corpus, document = self.corpora[source], int(self.documents[source][index])
            stop = at + length
            ahead = corpus.read(document, offset, min(length + 1, int(corpus.lengths[document]) - offset))
            known = len(ahead) - 1  # targets; one fewer than tokens where the document ends
            tokens[at:stop], targets[at : at + known] = ahead[:length], ahead[1:]
            if corpus.mask is not None:
                mask[at : at + known] = corpus.mask.read(document, offset + 1, known)
            mask[at + known : stop] = 0
            at = stop
        named = [p._replace(document=int(self.documents[p.source][p.document])) for p in pieces]
        return PackedTokens(np.array([p.length for p in pieces], np.int64), named, tokens, targets, mask)


def split_documents(count: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(documents to train on, documents held out), each ascending: a random share, at least one held out if there are two or more."""
    held = 0 if fraction <= 0 or count < 2 else min(count - 1, max(1, round(count * fraction)))
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 0x5EED)))).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])
