"""Checkpoints: written whole or not at all, verified before they are read, loaded at any degrees of parallelism."""

from typing import TYPE_CHECKING, Any

from lsys.checkpoint.manifest import FORMAT_VERSION, CheckpointError, Cursor, Manifest

if TYPE_CHECKING:
    from lsys.checkpoint.store import Checkpoints

__all__ = ["FORMAT_VERSION", "CheckpointError", "Checkpoints", "Cursor", "Manifest"]


def __getattr__(name: str) -> Any:
    """`Checkpoints` needs torch; which checkpoint there is, and whether it fits, is told without."""
    if name == "Checkpoints":
        from lsys.checkpoint.store import Checkpoints

        return Checkpoints
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
