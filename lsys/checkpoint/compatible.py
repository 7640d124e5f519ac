"""Whether the model of a checkpoint is the model of a configuration."""

from typing import Any

import yaml
from pydantic import ValidationError

from lsys.config import Config
from lsys.config.load import model_keys
from lsys.config.messages import from_validation
from lsys.config.model import Model
from lsys.config.schema import ADAMW
from lsys.config.user_code import OWN, UserCode

# Fields of the model that change no stored tensor; the rest must be equal.
FREE = frozenset({"vocab", "vocab_multiple", "init_std"})  # of the vocabulary only the padded size counts
FUNCTION = frozenset(
    {"rope_base", "norm_eps"}
)  # what the model computes changes: allowed, and told (`lsys.checkpoint.changes`)
MISSING = object()  # in the place of a key that one of the two does not have


def differences(stored: str, settings: Config, *, weights: bool = False) -> list[str]:
    """Every reason why a checkpoint with the configuration `stored` (YAML) cannot be loaded into a run with `settings`.

    Args:
        weights: whether the weights alone are to be loaded, whatever optimizer wrote them.
    """
    tree = yaml.safe_load(stored)
    # Of what the checkpoint names, what the configuration names too is imported; the rest does not run.
    code = UserCode(settings.model.mixers.paths)
    try:
        old, new = model_keys(tree["model"], code), model_keys(settings.model)
    except ValidationError as error:
        if code.refused:
            return [f"the model in the checkpoint would run code that {OWN}: {', '.join(code.refused)}"]
        return [
            f"the model in the checkpoint is none that this lsys knows ({mistake})"
            for mistake in from_validation(error, Model)
        ]
    found = [
        f"model.{name} {text_of(old.get(name, MISSING))} in the checkpoint, {text_of(new.get(name, MISSING))} in the config"
        for name in sorted(old.keys() | new.keys())
        if name not in FREE | FUNCTION and old.get(name) != new.get(name)
    ]
    return found + _vocabulary(old, new) + ([] if weights else _optimizer(tree, settings))


def _vocabulary(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    def padded(model: dict[str, Any]) -> int:
        return -(-model["vocab"] // model["vocab_multiple"]) * model["vocab_multiple"]

    if padded(old) == padded(new):
        return []
    return [
        f"model.vocab {old['vocab']} (padded to {padded(old)}) in the checkpoint, "
        f"{new['vocab']} (padded to {padded(new)}) in the config"
    ]


def _optimizer(tree: dict[str, Any], settings: Config) -> list[str]:
    """The two optimizers of Megatron store different tensors; the plain one also with and without master weights."""
    found, distributed = [], tree["optimizer"]["distributed"]
    if (kind := tree["optimizer"].get("kind", ADAMW)) != settings.optimizer.kind:
        found.append(f"optimizer.kind {kind} in the checkpoint, {settings.optimizer.kind} in the config")
    if distributed != settings.optimizer.distributed:
        found.append(
            f"optimizer.distributed {text_of(distributed)} in the checkpoint, {text_of(settings.optimizer.distributed)} in the config"
        )
    elif not distributed and tree["train"]["precision"] != settings.train.precision:
        found.append(
            f"train.precision {tree['train']['precision']} in the checkpoint, {settings.train.precision} in the config "
            "(with optimizer.distributed false)"
        )
    return found


def text_of(value: Any) -> str:
    """A value of the configuration as YAML has it, on one line."""
    return (
        "unknown"
        if value is MISSING
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    )
