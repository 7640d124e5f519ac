"""What torchrun tells a process about itself."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


class LaunchError(ValueError):
    """A launcher's variable cannot be read."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together; the defaults are one process on its own.

    Attributes:
        rank, world_size: over all nodes. local_rank, local_world_size: on this node. node: index of the node.
        restart_count: how often torchrun has restarted the workers; nodes may disagree on it.
        is_torchrun: whether a launcher gave a rendezvous address.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    restart_count: int = 0
    is_torchrun: bool = False


VARIABLES = {
    "rank": "RANK",
    "world_size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_world_size": "LOCAL_WORLD_SIZE",
    "node": "GROUP_RANK",
    "restart_count": "TORCHELASTIC_RESTART_COUNT",
}


def launch_from_environment(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch as torchrun's variables describe it; one process where there are none.

    Raises:
        LaunchError: a variable is not a number, the rank is not below the world size, or ranks do not know their nodes.
    """
    values: dict[str, int] = {}
    for name, variable in VARIABLES.items():
        if variable in environment:
            try:
                values[name] = int(environment[variable])
            except ValueError:
                raise LaunchError(
                    f"{variable} is {environment[variable]!r}, not a number; start with torchrun, or unset it"
                ) from None
    launch = Launch(**values, is_torchrun={"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys())
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(
            f"RANK {launch.rank} is not below WORLD_SIZE {launch.world_size}; start with torchrun, or unset both"
        )
    if launch.is_torchrun and launch.world_size > 1 and "GROUP_RANK" not in environment:
        # Ranks would all take node 0 for theirs: bytes and clocks of different nodes would pass for one node's.
        raise LaunchError(
            "GROUP_RANK, the number of this rank's node, is missing; start with torchrun or launch/run.sh, or set it"
        )
    return launch
