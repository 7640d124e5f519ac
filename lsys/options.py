"""Options of the commands that take a configuration; every key of the YAML is an option besides."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class TrainOptions:
    """Train as the configuration says. Every key of the YAML is an option too, such as --parallel.tensor 2."""

    config: Positional[Path]
    """YAML file of the run."""


@dataclass(frozen=True)
class CheckOptions:
    """Say every mistake of a configuration, or what it resolves to. Every key of the YAML is an option too."""

    config: Positional[Path]
    """YAML file of the run."""
    world_size: int
    """Number of ranks that the run is to have."""
    ranks_per_node: int = 8
    """Ranks of one node; nodes are filled one after the other."""
    hardware: str | None = None
    """What it is to run on, for memory, bytes and times: a GPU and how many a node has, such as h100x8, h200x8, a100x8 or b200x8, or the
    JSON of a calibration."""
    search: bool = False
    """Propose the best degrees for this world size, with --hardware."""
    files: bool = False
    """Look whether the corpora and the checkpoint to resume from are on this machine, too."""


@dataclass(frozen=True)
class TopologyOptions:
    """Say where each rank is and who its peers are. Every key of the YAML is an option too."""

    config: Positional[Path]
    """YAML file of the run."""
    world_size: int
    """Number of ranks that the run is to have."""
    ranks_per_node: int = 8
    """Ranks of one node; nodes are filled one after the other."""
