"""Masks by their definition, token by token, and as tests name them: what `softmax_attention` takes, and `shares`.

`shares` lays the documents in groups that share a prefix, of as many documents as the cycle below says.
"""

from itertools import accumulate
from typing import Any

import torch

from lsys.kernels.mask import Mask, Own, SharedPrefix

CYCLE = (3, 1, 4)  # groups of so many documents, over and over; the last has what is left
SHARES: list[dict[str, Any]] = [
    {"shares": True},
    {"shares": True, "causal": False},
    {"shares": True, "window": 6},
    {"shares": True, "window": 40},
]


def groups(documents):
    ends = [0]
    while ends[-1] < documents:
        ends.append(min(ends[-1] + CYCLE[(len(ends) - 1) % len(CYCLE)], documents))
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def mask_of(options, documents):
    """The mask of these options, over so many documents."""
    seen = SharedPrefix(groups(documents)) if options.get("shares") else Own()
    return Mask(options.get("causal", True), options.get("window"), seen)


def arguments(options, documents):
    """These options as `softmax_attention` takes them: `causal` and `window` as users give them where that is possible."""
    if not options.get("shares"):
        return dict(options)
    return {"mask": mask_of(options, documents)} | ({"scale": options["scale"]} if "scale" in options else {})


# ---- the definition, which asks a mask for nothing but what it was given

# By kind: (the document that it sees beside itself or None, how many tokens stand before its first), of each document.
DEFINITIONS = {
    Own: lambda documents, lengths: [(None, 0)] * len(lengths),
    SharedPrefix: lambda documents, lengths: [
        (None, 0) if place == 0 else (first, lengths[first])
        for first, size in zip([0, *accumulate(documents.groups)], documents.groups, strict=False)
        for place in range(size)
    ],
}


def sees(lengths, mask):
    """Whether each token of a pack, by row, sees each, by column: bool [T, T]."""
    beside = DEFINITIONS[type(mask.documents)](mask.documents, lengths)
    tokens = [(d, beside[d][1] + p) for d, n in enumerate(lengths) for p in range(n)]  # document, where it stands
    document, place = torch.tensor(tokens, dtype=torch.int64).reshape(-1, 2).unbind(1)
    other = torch.tensor([-1 if first is None else first for first, _ in beside], dtype=torch.int64)[document]
    seen = (document[:, None] == document) | (other[:, None] == document)
    age = place[:, None] - place
    if mask.causal:
        seen &= age >= 0
    return seen if mask.window is None else seen & (age < mask.window)
