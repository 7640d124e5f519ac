"""Process groups: torch.distributed and Megatron's grid of tensor, context, data and pipeline ranks."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lsys.config.schema import Parallel
from lsys.parallel.comm import SequenceComm
from lsys.parallel.ledger import WORLD, label, unlabel
from lsys.runtime.environment import Launch, LaunchError
from lsys.runtime.megatron import install_megatron

# What Megatron's groups are accounted to, by their names in ProcessGroupCollection. Norms and found infinities are summed
# over all ranks that share out the model.
AXES = {"tp": "tensor", "cp": "context", "pp": "pipeline", "embd": "pipeline", "pos_embd": "pipeline", "dp": "data"}
AXES |= {"dp_cp": "data", "intra_dp_cp": "data", "mp": "model", "intra_dist_opt": "model"}


@dataclass(frozen=True)
class Groups:
    """This process among the others.

    Attributes:
        launch: rank, world size and node, as torchrun says.
        device: where this rank computes.
        collection: Megatron's ProcessGroupCollection (tp, cp, dp, pp, dp_cp, embd, ...).
        context: the ranks that share the tokens of a micro-batch.
        nodes: node of every rank.
    """

    launch: Launch
    device: torch.device
    collection: Any
    context: SequenceComm
    nodes: tuple[int, ...]

    @property
    def data_rank(self) -> int:
        return self.collection.dp.rank()

    @property
    def data_size(self) -> int:
        return self.collection.dp.size()

    @property
    def context_rank(self) -> int:
        return self.context.rank

    @property
    def is_last_stage(self) -> bool:
        return self.collection.pp.rank() == self.collection.pp.size() - 1


def device_of(launch: Launch) -> torch.device:
    return torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def own_device() -> torch.device:
    """Where this process has its model: the GPU that it has chosen, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def process_groups(parallel: Parallel, launch: Launch, *, timeout_minutes: float = 10.0) -> Iterator[Groups]:
    """Start the process groups of a run (NCCL on GPUs, gloo on CPUs), and end those that it started.

    A default process group that exists already is used and left in place. Rank order is Megatron's: tensor fastest, then context, data,
    pipeline.
    """
    install_megatron()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    device = device_of(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = not dist.is_initialized()
    if started:
        _start(launch, device, timedelta(minutes=timeout_minutes))
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
        )
        model_parallel_cuda_manual_seed(0)  # Megatron's trackers want a seed; nothing here draws from them (no dropout)
        collection = ProcessGroupCollection.use_mpu_process_groups()
        nodes = SequenceComm(None, axis=WORLD).all_gather(torch.tensor([launch.node], device=device)).tolist()
        with _labelled(collection, nodes):
            yield Groups(launch, device, collection, _context(collection, nodes, device), tuple(nodes))
    finally:
        parallel_state.destroy_model_parallel()
        if started:
            dist.destroy_process_group()


@contextlib.contextmanager
def _labelled(collection: Any, nodes: Sequence[int]) -> Iterator[None]:
    """Tell the ledger which axis each of Megatron's groups belongs to, until this mesh ends."""
    groups = {name: group for name in AXES if (group := getattr(collection, name, None)) is not None}
    for name, group in groups.items():
        label(group, AXES[name], [nodes[rank] for rank in dist.get_process_group_ranks(group)])
    try:
        yield
    finally:
        for group in groups.values():
            unlabel(group)


def _context(collection: Any, nodes: Sequence[int], device: torch.device) -> SequenceComm:
    """The context ranks and their nodes."""
    # NCCL's point-to-point operations want a collective of all the group's ranks before.
    ranks = SequenceComm(collection.cp).all_gather(torch.tensor([dist.get_rank()], device=device)).tolist()
    return SequenceComm(collection.cp, node_of_rank=[nodes[rank] for rank in ranks])


def _start(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    if launch.is_torchrun:
        kwargs: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout, **kwargs)
        return
    if launch.world_size > 1:
        missing = f"WORLD_SIZE is {launch.world_size}, and MASTER_ADDR or MASTER_PORT, where ranks meet, is missing"
        raise LaunchError(f"{missing}; start with torchrun or launch/run.sh, or set them", everywhere=True)
    store = dist.HashStore()  # one process, no network
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1, timeout=timeout
    )
