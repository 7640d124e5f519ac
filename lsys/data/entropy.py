"""How predictable tokens are from the one before: the mark that a model must beat to have learned more than pairs."""

import numpy as np
from numpy.typing import NDArray


class BigramCounter:
    """Counts pairs of adjacent tokens inside documents.

    Args:
        vocab: number of ids; memory is 8 vocab^2 bytes, so this is for byte-sized vocabularies.
    """

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.counts = np.zeros(vocab * vocab, np.int64)

    def add(self, tokens: NDArray[np.int64]) -> None:
        """Count the pairs of one document."""
        pairs = tokens[:-1] * self.vocab + tokens[1:]
        self.counts += np.bincount(pairs, minlength=self.vocab * self.vocab)

    def entropy(self) -> float:
        """H(next | this), nats per token: sum over pairs of p(a, b) log(p(a) / p(a, b))."""
        joint = self.counts.reshape(self.vocab, self.vocab) / max(1, self.counts.sum())
        first = joint.sum(1, keepdims=True)
        seen = joint > 0
        return float((joint[seen] * np.log((first / np.where(seen, joint, 1))[seen])).sum())
