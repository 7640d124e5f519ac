"""Cards of the user's own: their options come back as they were, and what they declare wrongly is told before a run starts."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
from pydantic import Field
from support import parity

from lsys.checkpoint.compatible import differences
from lsys.config.load import dump, loads, model_keys
from lsys.config.losses import LayerLoss, layer_losses
from lsys.config.messages import ConfigError
from lsys.config.reports import declared
from lsys.config.rules import check
from lsys.config.user_code import UserCode
from lsys.mixers.card import Kept
from lsys.mixers.state import StateCard, StateOptions


class Options(StateOptions):
    span: int | None = Field(128, description="Tokens.")
    shares: dict[str, int | None] = Field({}, description="By name.")
    weight: float = Field(0.1, description="Of its loss.")


class Plain(StateCard):
    """Its layers have a module; no test here makes it."""

    name, title, module, decay = "plain", "plain", "my_parts.mixers:FeatureMixer", "none"
    Options = Options

    def parts(self) -> dict[str, int]:
        return {"qkv": 2 * self.key_width + self.served}

    def kept(self, place: Any) -> Kept:
        return Kept(0.0, 0.0, "kernel")


def config_of(**variants: Any) -> Any:
    """A model whose layers are these variants."""
    return parity.settings(model__pattern=[*variants], model__mixers=variants)


def plain(**options: Any) -> dict[str, Any]:
    return {"kind": f"{__name__}:Plain", **options}


# ---- options


def test_what_is_empty_and_would_not_be_comes_back_empty() -> None:
    config = config_of(one=plain(span=None, shares={"a": None, "b": 2}))
    again: Any = loads(dump(config), UserCode(None)).model.mixers.section("one")
    assert (again.span, again.shares) == (None, {"a": None, "b": 2})
    assert model_keys(config.model)["mixers.one.span"] is None
    assert differences(dump(config), config) == []
    assert differences(dump(config_of(one=plain())), config_of(one=plain(span=None))) == [
        "model.mixers.one.span 128 in the checkpoint, null in the config"
    ]
    assert "mixers.one.heads" not in model_keys(config.model)  # what is empty by default is left out


# ---- losses


Loss: Any = LayerLoss  # made wrongly too


def starts(batch: Any, unit: int = 1) -> Any:
    return (batch.packed.positions == 0).sum() / unit


def told(declare: Any, *variants: dict[str, Any]) -> list[str]:
    """The mistakes of a model of these variants, called one and two, whose card declares so."""
    config = config_of(**dict(zip(("one", "two"), variants or (plain(),), strict=False)))
    with mock.patch.object(Plain, "losses", declare):
        found = [str(mistake) for mistake in check(config, 1)]
        assert all(mistake.is_local for mistake in check(config, 1))  # the card's code, which a node may have otherwise
        if found:
            with pytest.raises(ConfigError) as caught:
                declared(config)
            assert str(caught.value).splitlines() == found
        else:
            assert len({metric.name for metric in declared(config)}) == 3 + len(layer_losses(config))
    return found


SAME: dict[str, Any] = {
    "a function": lambda self: [Loss("balance", 0.1, starts)],
    "a function that each call makes": lambda self: [Loss("balance", 0.1, lambda batch: len(batch.tokens))],
    "a function that holds the same": lambda self: [Loss("balance", 0.1, lambda b, n=self.model.hidden: starts(b, n))],
    "names of their own": lambda self: [Loss(f"{self.key}/balance", self.own.weight, lambda batch: self.own.span)],
    "a cosine's": lambda self: [Loss("loss_metrics/balance", -1, "targets"), Loss("lr/balance", 0)],
}


@pytest.mark.parametrize("case", SAME)
def test_variants_may_share_a_loss(case: str) -> None:
    assert told(SAME[case], plain(), plain(weight=0.1 if "a function" in case else 0.3)) == []


REMEDY = 'a name has one of each; the card may name it by its section: f"{self.key}/balance"'
TAKEN = "has the name of something else that a run reports; the card may name it by its section"


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda self: [Loss("balance", self.own.weight)], f"has the weight 0.5, and 0.1 in model.mixers.one; {REMEDY}"),
        (lambda self: [Loss("balance", 1, ("tokens", "targets")[self.key == "two"])], f"counts by targets, and by tokens in model.mixers.one; {REMEDY}"),
        (lambda self: [Loss("balance", 1, lambda batch: self.own.weight)], "<lambda>, and by that with other values in model.mixers.one"),
        (lambda self: [Loss("balance", 1, self.kept)], "counts by Plain.kept, and by that with other values in model.mixers.one"),
        (lambda self: [Loss("balance", 1, partial(starts, unit=2))], "in model.mixers.one; a name has one of each"),
    ],
)  # fmt: skip
def test_a_name_of_two_losses_is_told(declare: Any, said: str) -> None:
    (found,) = told(declare, plain(), plain(weight=0.5))
    assert found.startswith("model.mixers.two: the loss 'balance' ") and said in found


def test_two_functions_of_one_card_are_two() -> None:
    both = [Loss("balance", 1, lambda batch: 1), Loss("balance", 1, lambda batch: 2)]
    assert len(told(lambda self: both)) == 1


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        *((lambda self, name=name: [Loss(name, 0.1)], f"the loss {name!r} {TAKEN}") for name in
          ("tokens", "grad_norm", "lr", "mfu(%)", "loss_metrics/global_avg_loss", "validation/x", "waterfall/mine(%)")),
        (lambda self: [Loss("a", 0.1, "token")], "the loss 'a' counts 'token'; there are 'tokens', 'targets', or a function of a micro-batch"),
        (lambda self: [Loss("a", 0.1, None)], "the loss 'a' counts None; there are"),
        (lambda self: [Loss("a", float("nan"))], "the loss 'a' has the weight nan; a weight is a finite number"),
        (lambda self: [Loss("a", "0.1")], "the loss 'a' has the weight '0.1'; a weight is a finite number"),
        (lambda self: [Loss("", 0.1)], "a loss is called ''; a curve has its name"),
        (lambda self: [Loss(["a"], 0.1)], "a loss is called ['a']; a curve has its name"),
        (lambda self: [("a", 0.1)], "its losses() gives ('a', 0.1); losses() gives LayerLoss of lsys.config.losses"),
        (lambda self: None, "its losses() raised TypeError: 'NoneType' object is not iterable; losses() gives"),
        (lambda self: self.nothing(), "its losses() raised AttributeError"),
    ],
)  # fmt: skip
def test_a_loss_that_does_not_do_is_told(declare: Any, said: str) -> None:
    (found,) = told(declare)
    assert found.startswith(f"model.mixers.one: {said}")
