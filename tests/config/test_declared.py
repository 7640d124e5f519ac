"""Cards of the user's own: their options come back as they were, and what they declare wrongly is told before a run starts."""

from typing import Any

from pydantic import Field
from support import parity

from lsys.checkpoint.compatible import differences
from lsys.config.load import dump, loads, model_keys
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
