"""Checkpoints: written whole or not at all, verified before they are read, loaded at any degrees of parallelism."""

from lsys.checkpoint.manifest import FORMAT_VERSION, CheckpointError, Cursor, Manifest
from lsys.checkpoint.store import Checkpoints

__all__ = ["FORMAT_VERSION", "CheckpointError", "Checkpoints", "Cursor", "Manifest"]
