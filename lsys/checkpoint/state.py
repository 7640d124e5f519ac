"""The state of a run: what its engine holds, and random numbers."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from lsys.checkpoint import storage
from lsys.checkpoint.agreement import agree
from lsys.checkpoint.held import Held
from lsys.checkpoint.manifest import FileRecord, Manifest
from lsys.checkpoint.replicas import require_equal


def degrees(engine: Held) -> dict[str, int]:
    parallel = engine.settings.parallel
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    return {name: getattr(parallel, name) for name in names} | {"data": engine.groups.data_size}


def state_to_save(engine: Held) -> dict[str, Any]:
    """The engine's state and random numbers, for `save_state`; compared with what other ranks hold alike (collective).

    Raises RankFailure, ReplicaError.
    """
    state = agree(lambda: engine.state(loading=False))
    require_equal(state, engine.groups.collection.pp.rank())
    return state | {"random": _random_object()}


def require_equal_models(engine: Held) -> None:
    """Compare this rank's part of the model with what other ranks hold alike (collective): before an update, which with the distributed optimizer
    makes all alike again, of what each part's owner has. Raises RankFailure, ReplicaError.
    """
    state = agree(lambda: engine.state(loading=False))
    require_equal({key: each for key, each in state.items() if key != "optimizer"}, engine.groups.collection.pp.rank())


def save_state(engine: Held, state: dict[str, Any], folder: Path) -> dict[str, FileRecord]:
    """Write the engine's state into an empty folder (collective); the files of all ranks. Raises RankFailure."""
    return storage.write(state, folder, engine.groups.collection.dp_cp)


def load_state(engine: Held, folder: Path, manifest: Manifest) -> None:
    """Read the engine's state from a verified checkpoint, whatever degrees it was written at (collective). Raises RankFailure.

    Random numbers are per rank: they are restored where the ranks are arranged as they were, else left as they are.
    """
    same_grid = manifest.world == dist.get_world_size() and manifest.degrees == degrees(engine)
    state = agree(lambda: engine.state(loading=True))
    if same_grid:
        state["random"] = _random_object()
    loaded = storage.read(state, folder, manifest.files)
    agree(lambda: engine.load_state(loaded))
    if same_grid:
        _restore_random(loaded["random"])


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
