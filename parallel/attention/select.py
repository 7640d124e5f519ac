"""What depends on data: of the pairs that a mask shows, those that one call attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lsys.kernels.softmax_attention import Tiles
from lsys.parallel.attention.tiles import Pairs
from lsys.parallel.segments import offsets


class Select(Protocol):
    """Chooses in each call: nothing of it is kept with the layout. What ranks send goes by the mask alone."""

    def __call__(self, pairs: Pairs, /) -> Tiles:
        """Tiles of those queries and keys of the pairs that see each other; none of them twice.

        Asked for each rank's queries and the keys that it has at a time, and for backward, where they are cut otherwise:
        it must answer alike for the same two tokens.
        """


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of queries see blocks of keys, as chosen; inside them, what the mask shows. A query without keys has o = 0.

    Attributes:
        size: tokens of a block; a document of n tokens has ceil(n / size), the last one shorter. Blocks are numbered
            through all documents of the layout.
        chosen: bool [blocks of queries, blocks of keys], on the host. A rank reads the rows of its queries, with
            `ulysses` and `usp` those of its group; the others may say anything.

    Raises:
        ValueError: sizes that do not fit together; in the call, blocks that are not those of the layout.
    """

    size: int
    chosen: Tensor

    def __post_init__(self) -> None:
        shape, dtype = [*self.chosen.shape], self.chosen.dtype
        if self.size < 1 or len(shape) != 2 or shape[0] != shape[1] or dtype != torch.bool or self.chosen.is_cuda:
            found = f"{shape} {dtype} on {self.chosen.device} for blocks of {self.size}"
            raise ValueError(f"chosen blocks are bool [blocks, blocks] on the host, of 1 token or more; got {found}")

    def __call__(self, pairs: Pairs, /) -> Tiles:
        lengths, size = torch.tensor(pairs.queries.layout.lengths, dtype=torch.int64), self.size
        numbers = offsets((lengths + size - 1) // size)  # of the first block of each document, then of all
        if int(numbers[-1]) != len(self.chosen):
            raise ValueError(
                f"{len(self.chosen)} blocks are chosen; of {size} tokens the layout has {int(numbers[-1])}"
            )
        q, n, k, m, first, last = pairs.tiles.columns
        i, j = pairs.query_start, pairs.key_start
        q_block, k_block = i // size, j // size
        q_blocks, k_blocks = ((at + length - 1) // size - at // size + 1 for at, length in ((i, n), (j, m)))
        many = q_blocks * k_blocks
        pair = torch.arange(len(many)).repeat_interleave(many)
        place = torch.arange(len(pair)) - offsets(many)[:-1][pair]
        query, key = q_block[pair] + place // k_blocks[pair], k_block[pair] + place % k_blocks[pair]
        seen = self.chosen[numbers[pairs.query_document][pair] + query, numbers[pairs.key_document][pair] + key]
        pair, query, key = pair[seen], query[seen], key[seen]
        # Blocks of keys that follow each other, beside one of queries, are one tile.
        starts = torch.ones(len(pair), dtype=torch.bool)
        starts[1:] = (pair.diff() != 0) | (query.diff() != 0) | (key.diff() != 1)
        head = starts.nonzero().flatten()
        tail = torch.cat([head[1:], torch.tensor([len(pair)])])[: len(head)] - 1
        pair, query = pair[head], query[head]
        low_q, low_k = (x.clamp(min=0) for x in (query * size - i[pair], key[head] * size - j[pair]))
        high_q = torch.minimum(n[pair], (query + 1) * size - i[pair])
        high_k = torch.minimum(m[pair], (key[tail] + 1) * size - j[pair])
        moved = low_q - low_k
        rows = q[pair] + low_q, high_q - low_q, k[pair] + low_k, high_k - low_k
        return Tiles(*rows, first[pair] + moved, last[pair] + moved).trimmed()
