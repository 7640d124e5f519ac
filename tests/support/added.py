"""Layers that add to the loss what is plain mathematics: sums of squares; and the same loss differentiated in one piece on one device."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from support import parity

Add = Callable[[Any, str, torch.Tensor, torch.Tensor], torch.Tensor]  # packed, name, total, through -> through
SLOTS, HEADS, STARTS = "probe/slots", "probe/heads", "probe/starts"
WEIGHTS = {SLOTS: 0.4, HEADS: 0.05, STARTS: 3.0}


def starts(batch: Any) -> torch.Tensor:
    """How many documents begin on this rank."""
    found: torch.Tensor = (batch.packed.positions == 0).sum()
    return found


def declare(config: Any) -> Iterable[Any]:
    from lsys.config.losses import LayerLoss

    yield LayerLoss(SLOTS, WEIGHTS[SLOTS])
    yield LayerLoss(HEADS, WEIGHTS[HEADS], count="targets")
    yield LayerLoss(STARTS, WEIGHTS[STARTS], count=starts)


@contextlib.contextmanager
def adding(add: Add, fault: str = "") -> Iterator[None]:
    """Inside, channel mixers add over the slots of the residual stream that they hold, `L` layers over their heads."""
    from lsys.config import losses
    from lsys.model.mixers.dense import DenseMLP
    from lsys.model.mixers.lightning import LightningMixer

    forward, mixing = DenseMLP.forward, LightningMixer.mix

    def channels(self: Any, hidden: torch.Tensor, *unused: Any, packed_seq_params: Any) -> Any:
        out, bias = forward(self, hidden, packed_seq_params=packed_seq_params)
        rows = packed_seq_params.filled(len(out), self.linear_fc1.tp_group.rank())
        return add(packed_seq_params, SLOTS, out[:rows].square().sum(), out), bias

    def mix(self: Any, projected: torch.Tensor, packed: Any, *more: torch.Tensor) -> torch.Tensor:
        if self.layer_number == 2:  # in the middle of any pipeline
            projected = add(packed, STARTS, projected[packed.positions == 0].pow(4).sum(), projected)
        mixed = mixing(self, projected, packed, *more)
        return add(packed, HEADS, mixed.square().sum(), mixed)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(losses, "SOURCES", [*losses.SOURCES, declare]))
        stack.enter_context(mock.patch.object(DenseMLP, "forward", channels))
        stack.enter_context(mock.patch.object(LightningMixer, "mix", mix))
        if fault:
            stack.enter_context(FAULTS[fault]())
        yield


def by_the_engine(packed: Any, name: str, total: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = packed.add_loss(name, total, through)
    return made


@contextlib.contextmanager
def engine_and_plan(rank: int, world_size: int, changes: dict[str, Any], add: Add, fault: str = "") -> Iterator[Any]:
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = parity.settings(**changes)
    parallel, train, stream = config.parallel, config.train, parity.RandomDocuments(config.model.vocab)
    with process_groups(parallel, Launch(rank=rank, world_size=world_size)) as groups, adding(add, fault):
        engine = Engine(config, groups)
        planner = Planner(
            stream,  # type: ignore[arg-type]
            train.batch_tokens,
            train.micro_batch_tokens,
            parallel.context,
            parallel.tensor,
            parallel.layout,
        )
        yield engine, planner.step(0, groups.data_rank, groups.data_size)


def trained(rank: int, world_size: int, changes: dict[str, Any], fault: str = "") -> dict[str, Any]:
    """What a step of the engine gives: gradients, what is reported; the same in a validation of two batches; the loss."""
    from lsys.model.parameters import pieces
    from lsys.train.protocol import Losses

    with engine_and_plan(rank, world_size, changes, by_the_engine, fault) as (engine, plan):
        groups = engine.groups
        batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
        first = groups.collection.pp.size()  # of two validation batches, which differ in what the losses count
        held_out, second = (
            engine.forward_backward(part, forward_only=True).values for part in (batches[:first], batches[first:])
        )
        held_out = Losses.of(held_out.followed_by(second))
        found = engine.forward_backward(batches, force_all_reduce=True)
        gradients = [
            (p.key, p.shape, p.offset, p.data.clone()) for c in engine.chunks for p in pieces(c.module, gradients=True)
        ]
        reported = [{name: each.values.curves[name] for name in WEIGHTS} for each in (found, held_out)]
        return {"pieces": gradients, "reported": reported, "losses": [found.mean, held_out.mean]}


def defined(rank: int, world_size: int) -> dict[str, Any]:
    """The same by autograd alone: all micro-batches as one, the total written down, one backward pass."""
    from lsys.config.reports import LOSS, Z_LOSS
    from lsys.data.plan import MicroBatch
    from lsys.model.parameters import pieces
    from lsys.parallel.layout import SequenceLayout

    totals: dict[str, torch.Tensor] = {}

    def note(packed: Any, name: str, total: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
        totals[name] = totals[name] + total if name in totals else total
        return through

    with engine_and_plan(rank, world_size, {}, note) as (engine, plan):
        parts, module = plan.micro_batches, engine.chunks[0].module
        lengths = [length for part in parts for length in part.layout.lengths]
        tokens, targets, mask = (
            torch.cat([getattr(p, name) for p in parts]) for name in ("tokens", "targets", "loss_mask")
        )
        whole = MicroBatch(SequenceLayout.contiguous(lengths, 1), tokens, targets, mask, len(tokens))
        batch = whole.on_rank(0, engine.groups.device, engine.groups.context)
        entropy: dict[str, torch.Tensor] = {}
        with mock.patch.object(type(batch.packed), "report", lambda self, name, value: entropy.update({name: value})):
            module(batch.tokens, batch.targets, batch.packed, batch.loss_mask)
        counts: dict[str, Any] = {SLOTS: len(tokens), HEADS: mask.sum(), STARTS: len(lengths)}
        loss = (entropy[LOSS] + entropy[Z_LOSS]) / mask.sum()
        loss = loss + sum(WEIGHTS[name] * totals[name] / counts[name] for name in WEIGHTS)
        parameters = list(module.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.main_grad.copy_(gradient)
        gradients = [(p.key, p.shape, p.offset, p.data.clone()) for p in pieces(module, gradients=True)]
        means = {name: float(totals[name].detach() / counts[name]) for name in WEIGHTS}
        return {
            "pieces": gradients,
            "reported": [means] * 2,
            "losses": [float(entropy[LOSS].detach() / mask.sum())] * 2,
        }


# ---- faults that such losses could have


def _recomputed_twice() -> Any:
    """What is recomputed is reported again."""
    from lsys.observe.values import Pass

    return mock.patch.object(Pass, "end", lambda self: None)


def _never_again() -> Any:
    """What is recomputed adds nothing, and so has no gradient."""
    from lsys.observe.values import Pass

    original = Pass.add_loss

    def add_loss(self: Any, name: str, total: Any, through: Any) -> Any:
        return through if self.has_ended else original(self, name, total, through)

    return mock.patch.object(Pass, "add_loss", add_loss)


def _own_counts(batches: Any, *_: Any) -> Any:
    """Each data and context rank counts for itself."""
    import lsys.observe.added_loss as added

    return mock.patch.object(added.dist, "all_reduce", lambda *args, **kwargs: None)


def _scaled(by: Callable[[Any], Any]) -> Any:
    import lsys.train.engine as engine

    original = engine.scales
    return mock.patch.object(
        engine, "scales", lambda *args: {name: by(scale) for name, scale in original(*args).items()}
    )


def _added(backward: Callable[[Any], Any]) -> Any:
    from lsys.observe.added_loss import Added

    original: Any = Added.backward
    return mock.patch.object(
        Added, "backward", staticmethod(lambda ctx, *gradients: backward(original(ctx, *gradients)))
    )


FAULTS: dict[str, Callable[[], Any]] = {
    "recomputed and reported again": _recomputed_twice,
    "recomputed and not differentiated": _never_again,
    "counted by rank": partial(_own_counts, None),
    "divided by the targets, whatever it counts": lambda: _scaled(
        lambda s: s._replace(factor=s.factor * s.counted / 370.0)
    ),
    "no weight": lambda: _scaled(lambda s: s._replace(factor=torch.ones_like(s.factor))),
    "not differentiated": lambda: _added(lambda gradients: (gradients[0], None, *gradients[2:])),
}
