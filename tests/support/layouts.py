"""Layouts, and schedules over them, that methods across ranks must all get right."""

import random

import torch
from hypothesis import strategies as st

from lsys.parallel.layout import SequenceLayout
from lsys.parallel.schedule import Schedule, Step, Transfer, parts_of

Piece = tuple[int, int, int]  # of a document: its number, where the piece starts, its tokens


def random_layout(lengths, ranks, seed):
    """Documents cut anywhere, pieces on any rank, in any order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    placed: list[list[Piece]] = [[] for _ in range(ranks)]
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


@st.composite
def drawn_layouts(draw, ranks):
    """As `random_layout`, drawn by hypothesis; lengths 0 and 1, primes and ranks without tokens are likely."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 7, 13, 31]) | st.integers(0, 40), min_size=1, max_size=6))
    placed: list[list[Piece]] = [[] for _ in range(ranks)]
    for document, length in enumerate(lengths):
        cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=5))})
        for start, stop in zip(cuts, cuts[1:], strict=False):
            rank = placed[draw(st.integers(0, ranks - 1))]
            rank.insert(draw(st.integers(0, len(rank))), (document, start, stop - start))
    return SequenceLayout(lengths, placed)


def random_schedule(layout, mask=None):
    """Everything reaches everyone by detours: parts of segments, several senders and receivers, passed on or sent anew."""
    draw = random.Random(layout.total)
    parts: dict[int, list[Piece]] = {rank: [] for rank in range(layout.ranks)}  # each rank's own, cut at random
    for rank, held in enumerate(layout.segments):
        for document, start, length in held:
            cuts = sorted({0, length, *(draw.randrange(length) for _ in range(2))})
            parts[rank] += [(document, start + a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    missing = {rank: {p for r in parts for p in parts[r] if r != rank} for rank in parts}
    hand: dict[int, list[Piece]] = {rank: [] for rank in parts}
    steps: list[Step] = []
    local: list[list[list[Piece]]] = [[[] for _ in parts] for _ in range(2)]
    for rank in parts:
        for part in parts[rank]:
            local[draw.randrange(2)][rank].append(part)
    while any(missing.values()) or len(steps) < 2:
        messages: dict[tuple[int, int], list[Piece]] = {}
        for source in draw.sample(sorted(parts), layout.ranks):
            for part in draw.sample(parts[source] + hand[source], len(parts[source] + hand[source])):
                for destination in parts:
                    if part in missing[destination] and draw.random() < 0.5:
                        messages.setdefault((source, destination), []).append(part)
                        missing[destination].remove(part)
        transfers = tuple(Transfer(a, b, parts_of(layout, sent)) for (a, b), sent in messages.items())
        now = local[len(steps)] if len(steps) < 2 else []
        steps.append(Step(transfers, tuple(parts_of(layout, sorted(own)) for own in now)))
        hand = {rank: [part for (_, to), sent in messages.items() if to == rank for part in sent] for rank in parts}
    return Schedule(layout.ranks, (*steps, Step()))
