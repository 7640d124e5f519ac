"""A step is planned: which tokens make its micro-batches, and where each of them goes.

A plan is a pure function of (cursor, step, document lengths). Every rank, pipeline stage and virtual chunk builds its own copy without
communication, and no number of ranks changes which tokens a step holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lsys.data.cursor import DataCursor, Interval, Span
from lsys.model.packed import PackedMicroBatch
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout

if TYPE_CHECKING:
    from lsys.data.stream import TokenStream


@dataclass(frozen=True)
class RankBatch:
    """One micro-batch on one context rank.

    Attributes:
        tokens, targets: int64 [slots]; the slots after the rank's T_r tokens are slack and hold zeros.
        loss_mask: fp32 [T_r], 1 where the target counts.
        packed: layout and positions of the T_r tokens, and who shares the layout.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    packed: PackedMicroBatch

    @property
    def slots(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of one data replica, before its tokens are spread over the context ranks.

    Attributes:
        layout: which tokens each context rank holds.
        tokens, targets: int64 [T], documents concatenated. Targets were looked up before anything was cut: the token that follows in the
            document, wherever it is.
        loss_mask: fp32 [T].
        slots: token slots of every rank, constant over the run: what the residual stream holds.
    """

    layout: SequenceLayout
    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    slots: int

    def slack(self, rank: int) -> int:
        """Slots of this rank that no document fills."""
        return self.slots - self.layout.tokens(rank)

    def on_rank(self, rank: int, device: torch.device, comm: SequenceComm | None = None) -> RankBatch:
        """The part of a rank of the layout; `comm`: the ranks that the layout is over, None is one rank."""

        def fill(x: Tensor) -> Tensor:  # [T] -> [slots]
            return torch.nn.functional.pad(self.layout.shard(x, rank), (0, self.slack(rank))).to(
                device, non_blocking=True
            )

        positions = self.layout.positions(rank).to(device, non_blocking=True)
        packed = PackedMicroBatch(layout=self.layout, positions=positions, comm=comm)
        mask = self.layout.shard(self.loss_mask, rank).to(device, non_blocking=True)
        return RankBatch(fill(self.tokens), fill(self.targets), mask, packed)


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one step that one data replica works on, in order."""

    step: int
    micro_batches: tuple[MicroBatch, ...]

    def on_rank(self, rank: int, device: torch.device, comm: SequenceComm | None = None) -> list[RankBatch]:
        return [micro_batch.on_rank(rank, device, comm) for micro_batch in self.micro_batches]


@dataclass(frozen=True)
class Planner:
    """Plans of all steps over one stream of tokens.

    Attributes:
        stream: the endless stream of documents.
        batch_tokens, micro_batch_tokens: tokens of a step over all replicas, of one micro-batch.
        context: context ranks of a replica; tensor: tensor degree, which slots are a multiple of; kind: the layout.
        window, seed: micro-batches are taken in random order within windows of this many (0: in the stream's order).
        limit: tokens from this offset of the stream on are masked from the loss (None: none). Validation reads each document once.
        cursor: which tokens each step reads, where its sizes were not always these; they are its last span's.
    """

    stream: "TokenStream"
    batch_tokens: int
    micro_batch_tokens: int
    context: int = 1
    tensor: int = 1
    kind: str = "zigzag"
    window: int = 0
    seed: int = 0
    limit: int | None = None
    cursor: DataCursor | None = None

    @cached_property
    def slots(self) -> int:
        """Token slots of a rank: its share of a micro-batch, rounded up to a multiple of the tensor degree."""
        share = -(-self.micro_batch_tokens // self.context)
        return -(-share // self.tensor) * self.tensor

    @cached_property
    def position(self) -> DataCursor:
        """Which tokens each step reads."""
        span = Span(0, 0, self.batch_tokens, self.micro_batch_tokens, self.window)
        return self.cursor or DataCursor((span,), self.seed)

    def step(self, step: int, replica: int = 0, replicas: int = 1) -> StepPlan:
        """The plan of one step for one of the data replicas: consecutive micro-batches of the step's tokens."""
        each = self.position.micro_batches(step) // replicas
        mine = range(replica * each, (replica + 1) * each)
        return StepPlan(step, tuple(self._micro_batch(self.position.micro_batch(step, index)) for index in mine))

    def steps(self, start: int, stop: int, replica: int = 0, replicas: int = 1) -> Iterator[StepPlan]:
        return (self.step(step, replica, replicas) for step in range(start, stop))

    def _micro_batch(self, intervals: Sequence[Interval]) -> MicroBatch:
        """A document that goes on behind a gap is another one there; targets are what follows in the document, wherever it is."""
        packs = [self.stream.batch(start, count) for start, count in intervals]
        lengths, tokens, targets, mask = (
            np.concatenate([getattr(pack, name) for pack in packs]) if len(packs) > 1 else getattr(packs[0], name)
            for name in ("lengths", "tokens", "targets", "loss_mask")
        )
        if self.limit is not None:
            places = np.concatenate([np.arange(start, start + count) for start, count in intervals])
            mask = np.where(places < self.limit, mask, 0)
        layout = getattr(SequenceLayout, self.kind)(tuple(lengths.tolist()), self.context)
        mask = torch.from_numpy(np.asarray(mask, dtype=np.float32))
        return MicroBatch(layout, torch.from_numpy(tokens), torch.from_numpy(targets), mask, self.slots)
