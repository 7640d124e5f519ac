"""What torchrun tells a process about itself."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


class LaunchError(ValueError):
    """A launcher's variable cannot be read, or the launcher is one that lsys does not start ranks with.

    Attributes:
        everywhere: whether all processes of the launch find the same. number: of this process among them, where the launcher is another's.
    """

    def __init__(self, text: str, everywhere: bool = False, number: int = 0) -> None:
        self.everywhere, self.number = everywhere, number
        super().__init__(text)


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


RENDEZVOUS = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what ranks need to find each other
VARIABLES = {
    "rank": "RANK",
    "world_size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_world_size": "LOCAL_WORLD_SIZE",
    "node": "GROUP_RANK",
    "restart_count": "TORCHELASTIC_RESTART_COUNT",
}


@dataclass(frozen=True)
class Foreign:
    """What another launcher than torchrun tells each process that it has started: in `size` how many there are, in `number` which this is."""

    name: str
    size: str
    number: str
    remedy: str = "torchrun --nproc-per-node {size} -m lsys train CONFIG, on several nodes launch/run.sh CONFIG on each"


SLURM = "srun --ntasks-per-node 1 launch/run.sh CONFIG"
# SLURM_NTASKS would not do: a job's script, of which there is one, has it too.
FOREIGN = (
    Foreign("Open MPI's mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Foreign("MVAPICH's mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    Foreign("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", SLURM),
    Foreign("mpirun or mpiexec", "PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI; also Slurm's for these
    Foreign("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    Foreign("flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
)


def require_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to train under a launcher that starts several processes without making ranks of them: each would be a run of its own.

    Raises:
        LaunchError: names the variable, and what to start with.
    """
    if environment.keys() >= RENDEZVOUS:
        return
    for launcher in FOREIGN:
        size = environment.get(launcher.size, "")
        if size.isdigit() and int(size) > 1:
            number = environment.get(launcher.number, "0")
            raise LaunchError(
                f"{launcher.size} is {size}: {launcher.name} has started {size} processes, each of which would be a run of its own in the "
                f"same train.folder; start with {launcher.remedy.format(size=size)} (docs/launch.md)",
                everywhere=True,
                number=int(number) if number.isdigit() else 0,
            )


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
    launch = Launch(**values, is_torchrun=environment.keys() >= RENDEZVOUS)
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
