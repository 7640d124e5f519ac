"""One rank of `bench/attention.py`: times cases under torchrun and writes what the first rank knows of all as JSON.

torchrun --standalone --nproc-per-node 2 bench/workers/attention.py CASES.json RESULTS.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds lsys and bench here

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.common.tools import serve
from lsys.kernels.mask import Mask
from lsys.parallel.attention import softmax_attention
from lsys.parallel.comm import Pending, SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.ledger import record
from lsys.parallel.messages import Phase, Phases, Placement
from lsys.parallel.messages.attention import Shape
from lsys.parallel.methods import SOFTMAX
from lsys.parallel.replay import SoloComm


@dataclass(frozen=True)
class Case:
    """One measurement. `comm`: "overlapped" as always, "serial" waits for each transfer at once, "none" fakes them.

    `reference`: a file with the tokens' q, k, v, do and a single device's o, dq, dk, dv, to compare with.
    """

    method: str
    layout: str
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 4
    width: int = 64
    window: int | None = None
    comm: str = "overlapped"
    repeats: int = 3
    reference: str | None = None

    def make_layout(self, ranks: int) -> SequenceLayout:
        return getattr(SequenceLayout, self.layout)(self.lengths, ranks)

    def phases(self, nodes: Sequence[int]) -> Phases:
        """What it sends, by formulas."""
        place = Placement.of(self.layout, self.lengths, len(nodes))
        return SOFTMAX[self.method].phases(
            place, Shape(self.heads, self.kv_heads, self.width, 4), nodes, Mask(window=self.window)
        )

    def tensors(self, tokens: int) -> list[Tensor]:
        """q, k, v and the gradient of o, fp32."""
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        generator = torch.Generator().manual_seed(tokens)
        return [torch.randn(tokens, n, self.width, generator=generator) for n in heads]


class SerialComm(SequenceComm):
    """The control: every transfer has arrived before the call returns."""

    def exchange(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> Pending[Mapping[int, Tensor]]:
        pending = super().exchange(send, receive)
        pending.wait()
        return pending


def attend(case: Case, layout: SequenceLayout, comm: SequenceComm, tensors: list[Tensor]) -> list[Tensor]:
    """o, dq, dk and dv of this rank."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    o = softmax_attention(q, k, v, layout, comm, method=case.method, window=case.window)
    return [o.detach(), *torch.autograd.grad(o, leaves, tensors[3])]


def by_rank(phases: Iterable[Phase], ranks: int) -> list[int]:
    """Bytes that each rank receives."""
    received = [0] * ranks
    for _, destination, size in (message for phase in phases for message in phase):
        received[destination] += size
    return received


def measure(case: Case) -> dict[str, Any]:
    """Wall-clock of forward and backward (the slowest rank's, the best of the repeats) and bytes received by each rank."""
    comm = SerialComm(None) if case.comm == "serial" else SequenceComm(None)
    used = SoloComm(comm.rank, comm.size) if case.comm == "none" else comm
    layout = case.make_layout(comm.size)
    result: dict[str, Any] = {}
    if case.reference:
        whole = torch.load(case.reference, weights_only=True, mmap=True)
        tensors = [layout.shard(x, comm.rank) for x in whole[:4]]
    else:
        tensors = case.tensors(layout.tokens(comm.rank))
    with record() as ledger:
        outputs = attend(case, layout, used, tensors)  # warms up, too
    received = comm.all_gather(torch.tensor([ledger.bytes(direction="received")])).tolist()
    result["received"] = received
    forward, backward = case.phases(comm.node_of_rank)
    result["formula"] = by_rank((*forward, *backward), comm.size)
    if case.reference:
        errors = [
            float(((x - layout.shard(y, comm.rank)).abs() / (1 + y.abs().max())).max())
            for x, y in zip(outputs, whole[4:], strict=True)
        ]
        result["errors"] = comm.all_gather(torch.tensor([errors])).amax(0).tolist()
    del outputs
    times = []
    for _ in range(case.repeats):
        dist.barrier()
        start = time.perf_counter()
        attend(case, layout, used, tensors)
        times.append(float(comm.all_gather(torch.tensor([time.perf_counter() - start], dtype=torch.float64)).max()))
    return result | {"seconds": min(times, default=0.0)}


if __name__ == "__main__":
    serve(Case, measure)
