"""Five steps of the engine against a plain model that has nothing of lsys's or Megatron's: losses, norms, rates, parameters."""

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import parity
from support.plain_model import Batch, Recipe, Seen, Sizes, Training

VOCAB, STEPS, MICRO, COUNT = 64, 5, 61, 3


@dataclass(frozen=True)
class Case:
    """What is trained, and how far it may be from the plain model in fp64.

    Attributes:
        loss, z_loss, norm, parameters: relative; of a parameter, its norm.
        changes: what five steps made of a parameter, relative, beside `rounding` of its norm.
    """

    sizes: Sizes
    recipe: Recipe
    precision: str = "fp32"
    loss: float = 1e-6
    z_loss: float = 1e-6
    norm: float = 1e-6
    parameters: float = 1e-6
    changes: float = 1e-5
    rounding: float = 2e-7  # fp32 has 6e-8, and each step adds

    @property
    def keys(self) -> dict[str, Any]:
        """The same as keys of lsys's configuration."""
        m, r = self.sizes, self.recipe
        return {
            "model__pattern": m.mixers, "model__channels": m.channels, "model__layers": m.layers,
            "model__heads": m.heads, "model__groups": m.groups, "model__head_dim": m.head,
            "model__linear": {"heads": m.state_heads, "key_heads": m.key_heads, "key_dim": m.key, "head_dim": m.value},
            "model__tied": m.is_tied, "model__qk_norm": m.qk_norm, "model__vocab": VOCAB, "model__norm_eps": m.eps,
            "optimizer__schedule": r.schedule, "optimizer__lr": r.peak, "optimizer__min_lr": r.least,
            "optimizer__warmup_steps": r.warmup, "optimizer__decay_steps": r.decay, "train__steps": r.steps,
            "optimizer__beta1": r.betas[0], "optimizer__beta2": r.betas[1], "optimizer__eps": r.eps,
            "optimizer__weight_decay": r.weight_decay, "optimizer__clip": r.clip, "train__z_loss": r.z_loss,
            "train__precision": self.precision, "train__micro_batch_tokens": MICRO, "train__batch_tokens": COUNT * MICRO,
        }  # fmt: skip


SIZES: dict[str, Any] = dict(layers=4, heads=4, groups=2, head=8, state_heads=4, key_heads=2, key=6, value=8, eps=1e-2)
RECIPE: dict[str, Any] = dict(peak=0.001, warmup=2, decay=2, steps=STEPS, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5)
CASES = {
    "tied, cosine": Case(
        Sizes(mixers="SLDM", channels="F", is_tied=True, qk_norm=True, **SIZES),
        Recipe(schedule="cosine", least=0.0002, clip=0.3, z_loss=1e-2, **RECIPE),
    ),
    "untied, wsd": Case(
        Sizes(mixers="MDLS", channels="F-", is_tied=False, qk_norm=False, **SIZES),
        Recipe(schedule="wsd", least=0.0003, clip=0.0, z_loss=0.0, **RECIPE),
    ),
    "bf16, constant": Case(
        Sizes(mixers="SLDM", channels="F", is_tied=True, qk_norm=True, **SIZES),
        Recipe(schedule="constant", least=0.0, clip=0.3, z_loss=1e-2, **RECIPE | {"peak": 0.01}),
        "bf16",
        loss=1e-3,
        z_loss=1e-3,
        norm=3e-2,
        parameters=2e-2,
        changes=0.15,  # Adam divides by the size of a gradient, also of those that are rounding
        rounding=3e-3,
    ),
}


def stir(engine: Any) -> None:
    """Add to each parameter what its name gives, alike for all degrees: norms that are not 1, biases that are not 0."""
    from lsys.model.parameters import pieces

    for chunk in engine.chunks:
        for piece in pieces(chunk.module):
            seed = int.from_bytes(hashlib.sha256(piece.key.encode()).digest()[:4], "little")
            noise = torch.randn(piece.shape, generator=torch.Generator().manual_seed(seed))[piece.slices]
            large = (
                3.0 if piece.key.endswith("dt_bias") else 0.0
            )  # else Mamba's steps are so short that they hardly count
            piece.data.add_(large + (0.2 if len(piece.shape) == 1 else 0.1) * noise)
    engine.optimizer.reload_model_params()


def held(engine: Any) -> list[Any]:
    """This rank's pieces of the parameters."""
    from lsys.model.parameters import pieces

    with engine.settled_parameters():
        found = [p for chunk in engine.chunks for p in pieces(chunk.module)]
        return [(p.key, p.shape, p.offset, p.data.float().clone()) for p in found]


def trained(rank: int, world_size: int, changes: dict[str, Any]) -> tuple[list[Seen], list[Any], list[Any]]:
    """What the engine's five steps show, and this rank's parameters before and after them."""
    from support import resuming

    from lsys.data.plan import Planner

    with resuming.engine_of(rank, world_size, changes) as engine:
        stir(engine)
        before, seen, groups = held(engine), [], engine.groups
        parallel, stream = engine.settings.parallel, parity.RandomDocuments(VOCAB)
        arguments = (COUNT * MICRO, MICRO, parallel.context, parallel.tensor, parallel.layout)
        planner = Planner(stream, *arguments)  # type: ignore[arg-type]
        for step in range(STEPS):
            plan = planner.step(step, groups.data_rank, groups.data_size)
            losses = engine.forward_backward(plan.on_rank(groups.context_rank, groups.device, groups.context))
            rate, norm = engine.learning_rate, engine.step().norm
            seen.append(Seen(losses.mean, losses.z_loss / losses.tokens, norm, rate))
        return seen, before, held(engine)


def whole(shares: list[list[Any]]) -> dict[str, torch.Tensor]:
    return parity.merge([parity.Outcome(pieces=share) for share in shares])[0]


def batches(step: int) -> list[Batch]:
    """The micro-batches of a step, as the stream gives them."""
    stream, found = parity.RandomDocuments(VOCAB), []
    for number in range(COUNT * step, COUNT * (step + 1)):
        pack = stream.batch(number * MICRO, MICRO)
        tokens, targets, mask = (torch.from_numpy(x) for x in (pack.tokens, pack.targets, pack.loss_mask))
        found.append(Batch(tokens, targets, mask, pack.lengths.tolist()))
    return found


@pytest.mark.parametrize("degrees", [{}, {"parallel__tensor": 2, "parallel__context": 2}], ids=["one rank", "TP2xCP2"])
@pytest.mark.parametrize("name", CASES)
def test_five_steps_are_those_of_plain_pytorch(gloo: Any, name: str, degrees: dict[str, int]) -> None:
    case = CASES[name]
    outcomes = gloo(4 if degrees else 1, trained, case.keys | degrees)
    before, after = whole([before for _, before, _ in outcomes]), whole([after for *_, after in outcomes])
    plain = Training(before, case.sizes, case.recipe)
    wanted = [plain.train(batches(step)) for step in range(STEPS)]
    assert min(seen.norm for seen in wanted) > case.recipe.clip  # it clips, where it may
    for seen, *_ in outcomes:
        assert [each.rate for each in seen] == pytest.approx([each.rate for each in wanted], rel=1e-12)
        for quantity in ("loss", "z_loss", "norm"):
            had, due = ([getattr(each, quantity) for each in steps] for steps in (seen, wanted))
            assert had == pytest.approx(due, rel=getattr(case, quantity)), quantity
    assert after.keys() == plain.weights.keys()
    for key, start in before.items():
        found, known = after[key].double(), plain.weights[key].detach()
        error, change = float((found - known).norm()), float((known - start.double()).norm())
        assert error <= case.parameters * float(known.norm()) and change > 0, (key, error, float(known.norm()))
        assert error <= case.changes * change + case.rounding * float(known.norm()), (key, error, change)
