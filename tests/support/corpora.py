"""Corpora of tests, written byte by byte."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """Megatron's two files, without a description: documents of one sequence each, of numbers of two bytes; their prefix."""
    lengths = [len(document) for document in documents]
    count, starts = len(lengths), [2 * sum(lengths[:n]) for n in range(len(lengths))]
    numbers = struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *starts, *range(count + 1))
    Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1) + numbers)
    Path(f"{prefix}.bin").write_bytes(b"".join(np.array(each, np.uint16).tobytes() for each in documents))
    return prefix
