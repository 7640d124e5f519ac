"""What a run tells in words: Markdown tables for TensorBoard's Text."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lsys.data.corpus import Corpus
from lsys.observe.efficiency import commit, hardware_name, versions
from lsys.parallel.mesh import AXES, Mesh


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    cells = (str(cell).replace("|", "\\|").replace("\n", " ") for row in rows for cell in row)
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    lines += map(" | ".join, zip(*[cells] * len(heads), strict=True))
    return "\n".join(lines)


def rank_grid(mesh: Mesh, nodes: Sequence[int], limit: int = 256) -> str:
    """A Markdown table: node and coordinates of each rank."""
    axes = [axis for axis in AXES if mesh.degree(axis) > 1]
    places = ((rank, mesh.coordinates(rank)) for rank in range(min(mesh.world_size, limit)))
    grid = table(["rank", "node", *axes], [(rank, nodes[rank], *(at[axis] for axis in axes)) for rank, at in places])
    return grid + (f"\n... and {mesh.world_size - limit} more ranks" if mesh.world_size > limit else "")


def versions_table(device: torch.device) -> str:
    """A Markdown table: what the run is computed by, and the command that began it."""
    known = {
        **versions(),
        "commit": commit() or "unknown",
        "CUDA": torch.version.cuda or "none",
        "hardware": hardware_name(device),
        "host": platform.node(),
        "command": shlex.join(sys.argv),
    }
    return table(["what", "of this run"], known.items())


def corpora_table(corpora: Iterable[tuple[Corpus, float]]) -> str:
    """A Markdown table: what the run reads. Files of Megatron's own tools say neither tokenizer nor hash."""

    def row(corpus: Corpus, weight: float) -> tuple[Any, ...]:
        tokenizer = corpus.description.get("tokenizer") or {}
        tokens = f"{int(corpus.lengths.sum()):,}"
        hashed = corpus.description.get("sha256", {}).get(".bin", "unknown")
        return corpus.prefix, f"{weight:g}", tokens, f"{corpus.documents:,}", tokenizer.get("spec", "unknown"), hashed

    heads = ["corpus", "weight", "tokens", "documents", "tokenizer", "SHA-256 of its .bin"]
    return table(heads, (row(*pair) for pair in corpora))
