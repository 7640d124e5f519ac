"""One rank of `bench/linear.py`: times cases under torchrun and writes what the first rank knows of all as JSON.

torchrun --standalone --nproc-per-node 2 bench/workers/linear.py CASES.json RESULTS.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds lsys and bench here

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bench.common.tools import serve
from lsys.parallel.attention import softmax_attention
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.ledger import record
from lsys.parallel.linear import linear_attention

VARIANTS = ("none", "head", "token", "channel", "delta", "gated delta", "channel delta")


@dataclass(frozen=True)
class Case:
    """One measurement. method: of linear attention, or "ring", softmax attention's. variant: which linear attention."""

    method: str
    variant: str
    lengths: tuple[int, ...]
    layout: str = "contiguous"
    heads: int = 4
    width: int = 64
    repeats: int = 3

    def make_layout(self, ranks: int) -> SequenceLayout:
        return getattr(SequenceLayout, self.layout)(self.lengths, ranks)

    def tensors(self, tokens: int) -> dict[str, Tensor | None]:
        """q, k, v, log_decay, beta and the gradient of o: what the variant takes, fp32."""
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        q, k, v, do = (draw(tokens, self.heads, self.width) for _ in range(4))
        shapes: dict[str, tuple[int, ...]] = {
            "head": (self.heads,), "token": (tokens, self.heads), "channel": (tokens, self.heads, self.width),
            "gated delta": (tokens, self.heads), "channel delta": (tokens, self.heads, self.width),
        }  # fmt: skip
        delta = self.variant.endswith("delta")
        decay = -0.02 * draw(*shapes[self.variant]).abs() if self.variant in shapes else None
        return {
            "q": q, "k": F.normalize(k, dim=-1) if delta else k, "v": v, "log_decay": decay,
            "beta": torch.rand(tokens, self.heads, generator=generator) if delta else None, "do": do,
        }  # fmt: skip


def attend(case: Case, layout: SequenceLayout, comm: SequenceComm | None, tensors: dict[str, Tensor | None]) -> Tensor:
    """o of this rank; also computes all gradients."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in tensors.items() if name != "do"}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    assert q is not None and k is not None and v is not None
    if case.method == "ring":
        o = softmax_attention(q, k, v, layout, comm, method="ring")
        used = [q, k, v]
    else:
        log_decay, beta = leaves["log_decay"], leaves["beta"]
        o, _ = linear_attention(q, k, v, layout, comm, log_decay=log_decay, beta=beta, method=case.method)
        used = [x for x in leaves.values() if x is not None]
    torch.autograd.grad(o, used, tensors["do"])
    return o.detach()


def measure(case: Case) -> dict[str, Any]:
    """Wall-clock of forward and backward (the slowest rank's, the best of the repeats), bytes and calls of each rank."""
    comm = SequenceComm(None)
    layout = case.make_layout(comm.size)
    tensors = case.tensors(layout.tokens(comm.rank))
    with record() as ledger:
        attend(case, layout, comm, tensors)  # warms up, too
    counts = torch.tensor([[ledger.bytes(direction="received"), ledger.calls()]])
    received, calls = comm.all_gather(counts).T.tolist()
    times = []
    for _ in range(case.repeats):
        dist.barrier()
        start = time.perf_counter()
        attend(case, layout, comm, tensors)
        times.append(float(comm.all_gather(torch.tensor([time.perf_counter() - start], dtype=torch.float64)).max()))
    return {"received": received, "calls": calls, "seconds": min(times)}


if __name__ == "__main__":
    serve(Case, measure)
