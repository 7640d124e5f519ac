"""The state of a run as Megatron shards it: model chunks, optimizer, scheduler, random numbers."""

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from lsys.checkpoint import optimizer as adam
from lsys.checkpoint import storage
from lsys.checkpoint.agreement import agree
from lsys.checkpoint.manifest import FileRecord, Manifest
from lsys.config import Config
from lsys.runtime.groups import Groups


class Trainable(Protocol):
    """What is saved: `lsys.train.engine.Engine`, or anything with these."""

    settings: Config
    groups: Groups
    chunks: list[Any]
    optimizer: Any
    scheduler: Any


def degrees(engine: Trainable) -> dict[str, int]:
    parallel = engine.settings.parallel
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    return {name: getattr(parallel, name) for name in names} | {"data": engine.groups.data_size}


def save_state(engine: Trainable, folder: Path) -> dict[str, FileRecord]:
    """Write the engine's state into an empty folder (collective); the files of all ranks. Raises RankFailure."""
    state = agree(lambda: _sharded(engine, loading=False) | {"random": _random_object()})
    return storage.write(state, folder, engine.groups.collection.dp_cp)


def load_state(engine: Trainable, folder: Path, manifest: Manifest) -> None:
    """Read the engine's state from a verified checkpoint, whatever degrees it was written at (collective). Raises RankFailure.

    Random numbers are per rank: they are restored where the ranks are arranged as they were, else left as they are.
    """
    same_grid = manifest.world == dist.get_world_size() and manifest.degrees == degrees(engine)
    with adam.own_hyperparameters(engine.optimizer), adam.without_step_per_parameter(engine.optimizer):
        state = agree(lambda: _sharded(engine, loading=True))
        if same_grid:
            state["random"] = _random_object()
        loaded = storage.read(state, folder, manifest.files)
        agree(lambda: _put(engine, loaded))
    engine.scheduler.num_steps = 0  # Megatron adds the loaded count to its own
    engine.scheduler.load_state_dict(
        loaded["scheduler"]
    )  # after the groups have the configuration's learning rates again
    if same_grid:
        _restore_random(loaded["random"])


def _put(engine: Trainable, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(engine.chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"], strict=True)
    engine.optimizer.load_state_dict(loaded["optimizer"])
    adam.separate_steps(engine.optimizer)


def _sharded(engine: Trainable, *, loading: bool) -> dict[str, Any]:
    """Keys of tensors are global: layers are numbered over all stages and chunks."""
    metadata = {
        "dp_cp_group": engine.groups.collection.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",  # whole tensors, so that every degree may change
        "chained_optim_avoid_prefix": True,
    }
    adam.allocate(engine.optimizer)
    model = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(engine.chunks)
    }
    with adam.positions_without_padding(engine.optimizer):
        optimizer = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {**model, "optimizer": optimizer, "scheduler": engine.scheduler.state_dict()}


def _random_object() -> ShardedObject:
    """This rank's generators, as one of as many objects as there are ranks."""
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
