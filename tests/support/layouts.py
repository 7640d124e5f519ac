"""Layouts that methods across ranks must all get right."""

import torch

from lsys.parallel.layout import SequenceLayout


def random_layout(lengths, ranks, seed):
    """Documents cut anywhere, pieces on any rank, in any order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    placed = [[] for _ in range(ranks)]
    for document, length in enumerate(lengths):
        cuts = sorted({0, length, *(draw(length + 1) for _ in range(4))})
        for start, stop in zip(cuts, cuts[1:], strict=False):
            rank = placed[draw(ranks)]
            rank.insert(draw(len(rank) + 1), (document, start, stop - start))
    return SequenceLayout(lengths, placed)


def all_on_last(lengths, ranks):
    return SequenceLayout(lengths, [()] * (ranks - 1) + [[(d, 0, n) for d, n in enumerate(lengths)]])


def layouts(lengths, ranks):
    return {
        "contiguous": SequenceLayout.contiguous(lengths, ranks),
        "zigzag": SequenceLayout.zigzag(lengths, ranks),
        "random": random_layout(lengths, ranks, seed=len(lengths)),
        "all on last": all_on_last(lengths, ranks),
    }
