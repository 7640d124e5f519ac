"""What a resumed run does otherwise than the one that wrote its checkpoint, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lsys.checkpoint.compatible import FUNCTION, MISSING, text_of
from lsys.checkpoint.manifest import Manifest
from lsys.config import Config
from lsys.config.load import model_keys, resolved
from lsys.config.user_code import UserCode

# Where a run is kept and how it is begun; the line that tells of a resume has both.
SAID = frozenset({"train.folder", "checkpoint.resume", "checkpoint.weights"})
SCHEDULE = frozenset({"train.steps", *(f"optimizer.{key}" for key in ("lr", "min_lr", "schedule", "warmup_steps", "decay_steps"))})  # fmt: skip
AXES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")


def written_on(manifest: Manifest) -> str:
    """On how many ranks a checkpoint was written, and how they were arranged: "4 ranks (tensor 2, context 2)"."""
    arranged = ", ".join(f"{axis} {manifest.degrees[axis]}" for axis in AXES if manifest.degrees.get(axis, 1) > 1)
    ranks = f"{manifest.world} rank{'s' if manifest.world > 1 else ''}"
    return f"{ranks} ({arranged})" if arranged else ranks


def changes(manifest: Manifest, settings: Config, world: int, lr: float) -> list[str]:
    """Every key that differs, `key was -> is`: ranks and degrees first, then the schedule, data and the rest.

    Args:
        world: ranks of this run.
        lr: its learning rate of the next step.
    """
    old, new = _keys(yaml.safe_load(manifest.cursor.config)), _keys(resolved(settings))
    defaults = dict(_defaults(Config))
    differ = {}
    for key in dict.fromkeys([*new, *old]):
        was = old.get(key, defaults.get(key, MISSING))
        now = new.get(key, defaults.get(key, MISSING))
        if was != now and key not in SAID and not key.startswith("model."):
            differ[key] = f"{key} {text_of(was)} -> {text_of(now)}"
    found = {key: text for key, text in differ.items() if key.startswith("parallel.")}
    if manifest.world != world:
        found = {"ranks": f"ranks {manifest.world} -> {world}"} | found
    found |= {key: text for key, text in differ.items() if key in SCHEDULE}
    before = manifest.cursor.extra.get("lr")  # checkpoints of before have none
    if before is not None and before != lr:
        found["lr"] = f"learning rate of step {manifest.cursor.step + 1} {before:.4g} -> {lr:.4g}"
    found |= {key: text for key, text in differ.items() if key.startswith("data.")}
    return list((found | differ).values()) + function_changes(manifest.cursor.config, settings)


def function_changes(stored: str, settings: Config) -> list[str]:
    """The keys by which the model computes otherwise with the same weights."""
    try:
        old = model_keys(yaml.safe_load(stored)["model"], UserCode(settings.model.mixers.paths))
    except ValidationError:  # `differences` says more
        return []
    new = model_keys(settings.model)
    return [
        f"model.{name} {text_of(old.get(name, MISSING))} -> {text_of(new.get(name, MISSING))}"
        for name in sorted(FUNCTION)
        if old.get(name) != new.get(name)
    ]


def _keys(tree: Any, above: str = "") -> dict[str, Any]:
    """Values by dotted key; those of lists by their index."""
    if isinstance(tree, Mapping) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, Mapping) for value in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {above: tree}
    return {k: v for key, value in items for k, v in _keys(value, f"{above}.{key}" if above else key).items()}


def _defaults(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of keys that have defaults, which a configuration of an older version may be without."""
    for name, field in section.model_fields.items():
        key = f"{above}{name}"
        if isinstance(field.default, BaseModel):
            yield from _keys(field.default.model_dump(mode="json"), key).items()
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _defaults(field.annotation, f"{key}.")
        elif not field.is_required():
            yield key, field.default
