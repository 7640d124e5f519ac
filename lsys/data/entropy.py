"""How predictable tokens are from the one before: the mark that a model must beat to have learned more than pairs."""

import numpy as np
from numpy.typing import NDArray


class BigramCounter:
    """Counts pairs of adjacent tokens inside documents.

    Args:
        vocab: number of ids. Memory is 16 bytes for each pair that occurs, besides the tokens not yet counted.
        block: pairs that are gathered before they are counted.
    """

    def __init__(self, vocab: int, block: int = 1 << 20) -> None:
        self.vocab, self.block = vocab, block
        self.pairs, self.counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[NDArray[np.int64]] = []
        self._size = 0

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Count the pairs of one document."""
        pairs = tokens[:-1].astype(np.int64) * self.vocab + tokens[1:]
        self._waiting.append(pairs)
        self._size += len(pairs)
        if self._size >= self.block:
            self._count()

    def _count(self) -> None:
        fresh, counts = np.unique(np.concatenate((np.empty(0, np.int64), *self._waiting)), return_counts=True)
        self.pairs, place = np.unique(np.concatenate((self.pairs, fresh)), return_inverse=True)
        merged = np.zeros(len(self.pairs), np.int64)
        np.add.at(merged, place, np.concatenate((self.counts, counts)))
        self.counts, self._waiting, self._size = merged, [], 0

    def entropy(self) -> float:
        """H(next | this), nats per token: sum over pairs of p(a, b) log(p(a) / p(a, b)). 0 if there is no pair."""
        self._count()
        if not len(self.pairs):
            return 0.0
        _, first = np.unique(self.pairs // self.vocab, return_inverse=True)
        before = np.bincount(first, self.counts)[first]
        return float((self.counts * np.log(before / self.counts)).sum() / self.counts.sum())

    def unigram_entropy(self) -> float:
        """H(next), nats per token, of the tokens that follow another. 0 if there is no pair."""
        self._count()
        if not len(self.pairs):
            return 0.0
        _, second = np.unique(self.pairs % self.vocab, return_inverse=True)
        share = np.bincount(second, self.counts) / self.counts.sum()
        return float(-(share * np.log(share)).sum())
