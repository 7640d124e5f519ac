"""The base of every section of the YAML: frozen, and without keys that it does not know."""

import typing
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def held_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this annotation holds, itself or in a list."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
