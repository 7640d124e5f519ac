"""The data of a run: corpora opened and checked, training and validation plans, one step at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from lsys.config import Config
from lsys.data.corpus import Corpus
from lsys.data.cursor import DataCursor
from lsys.data.identity import identity
from lsys.data.plan import Planner, RankBatch
from lsys.data.stream import TokenStream
from lsys.observe.flops import training_flops
from lsys.runtime.groups import Groups


@dataclass(frozen=True)
class RunData:
    """Batches of this rank.

    Attributes:
        train: plans of training steps. held_out: plans of validation steps, or None.
        validation_steps: how many steps one validation has; 0: none.
        bigram_entropy: conditional entropy of the corpora's byte bigrams, nats per token, or None where it was not counted.
        corpora: that are read, with their weights.
    """

    settings: Config
    groups: Groups
    train: Planner
    held_out: Planner | None
    validation_steps: int
    bigram_entropy: float | None
    corpora: Sequence[tuple[Corpus, float]] = ()

    @property
    def position(self) -> DataCursor:
        """Which tokens each step reads, and how many were read before it."""
        return self.train.position

    def at(self, position: DataCursor) -> "RunData":
        """The same data from another position."""
        return replace(self, train=replace(self.train, cursor=position))

    @property
    def identity(self) -> dict[str, Any]:
        """What the data is, for the next start to be held to."""
        return identity(self.settings, [corpus for corpus, _ in self.corpora])

    def training(self, step: int) -> tuple[list[RankBatch], float]:
        """The rank's micro-batches of a step, and the FLOPs of the step on this data replica."""
        plan = self.train.step(step, self.groups.data_rank, self.groups.data_size)
        flops = sum(training_flops(self.settings.model, m.layout.lengths) for m in plan.micro_batches)
        return plan.on_rank(self.groups.context_rank, self.groups.device, self.groups.context), flops

    def flops_of_all(self, own: float) -> float:
        """Model FLOPs of all ranks, from those of this rank's data replica, whose documents are not the others'. All ranks call it."""
        total = torch.tensor(own, dtype=torch.float64, device=self.groups.device)
        dist.all_reduce(total)
        return float(total) * self.groups.data_size / dist.get_world_size()  # each replica's was added by all its ranks

    def validation(self) -> Iterator[list[RankBatch]]:
        if self.held_out is not None:
            for plan in self.held_out.steps(0, self.validation_steps, self.groups.data_rank, self.groups.data_size):
                yield plan.on_rank(self.groups.context_rank, self.groups.device, self.groups.context)


def open_data(settings: Config, groups: Groups, corpora: Sequence[Corpus]) -> RunData:
    """The plans of this rank over corpora that are open and checked."""
    weights = [corpus.weight for corpus in settings.data.corpora]
    fraction = settings.data.validation_fraction

    def planner(split: str, limit: int | None = None) -> Planner:
        train, parallel = settings.train, settings.parallel
        return Planner(
            TokenStream(corpora, weights, seed=settings.data.seed, split=split, validation_fraction=fraction),
            train.batch_tokens,
            train.micro_batch_tokens,
            context=parallel.context,
            tensor=parallel.tensor,
            kind=parallel.layout,
            window=settings.data.shuffle_window if split == "train" else 0,
            seed=settings.data.seed,
            limit=limit,
        )

    held_out, steps = None, 0
    if settings.train.validate_tokens and fraction > 0:
        whole = planner("validation").stream.epoch_tokens
        wanted = min(settings.train.validate_tokens, whole)
        steps = -(-wanted // settings.train.batch_tokens)
        held_out = planner("validation", limit=whole)  # the last batch may go beyond: each document counts once
    weighted = tuple(zip(corpora, weights, strict=True))
    return RunData(settings, groups, planner("train"), held_out, steps, _bigram_entropy(corpora, weights), weighted)


def _bigram_entropy(corpora: Sequence[Corpus], weights: list[float]) -> float | None:
    """Mean over the corpora by weight, where every one was counted when it was prepared."""
    counted = [corpus.bigram_entropy for corpus in corpora]
    if any(entropy is None for entropy in counted):
        return None
    return sum(e * w for e, w in zip(counted, weights, strict=True) if e is not None) / sum(weights)
