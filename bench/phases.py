"""What a token costs of documents that cross ranks, beside one of whole documents: the two phases of linear attention, on one thread.

    python bench/phases.py [--tokens 16384] [--heads 8] [--out docs/benchmarks/linear.json]

One segment, forward and backward, from a state that is known to the end: by the whole, and by its map first and its output
once the state has come. Both compute the same; no rank is waited for.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from bench.common.tools import run_sections, show
from bench.linear import least
from bench.workers.linear import VARIANTS
from lsys.kernels.linear_attention import linear_attention, segments
from lsys.kernels.linear_attention.transition import carry

WIDTH = 64


@dataclass(frozen=True)
class Options:
    """The two phases beside the whole."""

    tokens: int = 16384
    heads: int = 8
    out: Path | None = None


def made(variant: str, tokens: int, heads: int) -> list[Tensor | None]:
    """q, k, v, log-decay, beta, the state before."""
    q, k, v = torch.randn(3, tokens, heads, WIDTH)
    shapes = {
        "head": (heads,),
        "token": (tokens, heads),
        "channel": (tokens, heads, WIDTH),
        "gated delta": (tokens, heads),
        "channel delta": (tokens, heads, WIDTH),
    }
    decay = -0.02 * torch.randn(shapes[variant]).abs() if variant in shapes else None
    beta = torch.rand(tokens, heads) if variant.endswith("delta") else None
    k = k if beta is None else F.normalize(k, dim=-1)
    inputs = [q, k, v, decay, beta, torch.randn(1, heads, WIDTH, WIDTH)]
    return [None if x is None else x.requires_grad_() for x in inputs]


def whole(inputs: list[Any]) -> tuple[Tensor, ...]:
    tokens = (x if x is None or x.dim() == 1 else x[None] for x in inputs[:5])
    o, after = linear_attention(*tokens, initial_state=inputs[5], output_final_state=True, backend="chunked")
    assert after is not None  # asked for
    return _gradients(o[0], after, inputs)


def phases(inputs: list[Any]) -> tuple[Tensor, ...]:
    q, k, v, log_decay, beta, state = inputs
    held = segments(q, k, v, log_decay, beta, [len(q)], [0], backend="chunked")
    segment_map = held.segment_map()
    o = held.apply(segment_map, held.intra(), state)
    return _gradients(o, segment_map.state + carry(segment_map.transition, state), inputs)


def _gradients(o: Tensor, after: Tensor, inputs: list[Any]) -> tuple[Tensor, ...]:
    given = [x for x in inputs if x is not None]
    return torch.autograd.grad((o, after), given, (torch.ones_like(o), torch.ones_like(after)))


def compare(options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    rows: list[list[Any]] = []
    for variant in VARIANTS:
        inputs = made(variant, options.tokens, options.heads)
        apart = max(float((a - b).norm() / a.norm()) for a, b in zip(whole(inputs), phases(inputs), strict=True))
        if apart > 1e-4:
            raise SystemExit(f"{variant}: gradients are {apart:.1e} apart")
        one, two = least([partial(whole, inputs), partial(phases, inputs)])
        rows.append([variant, one, two, two / one])
    heads = ["variant", "whole s", "two phases s", "ratio"]
    show(f"one thread, {options.tokens} tokens, {options.heads} heads of {WIDTH}, forward and backward", heads, rows)
    return {"heads": heads, "rows": rows, "tokens": options.tokens, "of_heads": options.heads}


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    run_sections({"phases": compare}, (), chosen, chosen.out)
