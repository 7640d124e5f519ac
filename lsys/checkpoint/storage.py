"""Sharded state dicts on disk, in the `torch_dist` format of Megatron's dist_checkpointing.

Megatron prepares, validates and reshards the state; the bytes are written and read here. Its own writer starts a manager and forks a
process per file, and a failure on one rank leaves the others waiting; its own reader unpickles `.metadata` and every byte object
without restriction. The files are the same: either side reads the other's.
"""

import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    determine_main_replica_uniform_distribution,
    distribute_main_replicas_with_precomputed_distribution,
)
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from lsys.checkpoint.agreement import agree
from lsys.checkpoint.files import Files, Reader, Writer
from lsys.checkpoint.manifest import CheckpointError, FileRecord
from lsys.checkpoint.shards import STATES
from lsys.checkpoint.unpickle import load_metadata

METADATA = ".metadata"
BACKEND = "torch_dist"


def write(state: dict[str, Any], folder: Path, replicas: dist.ProcessGroup | None = None) -> dict[str, FileRecord]:
    """Write a sharded state dict into an existing, empty folder (collective).

    Args:
        replicas: ranks that hold the same tensors and share the work of writing them; all ranks if None.

    Returns:
        What every rank wrote, by file name; the same on all ranks.

    Raises RankFailure on all ranks if writing failed on any.
    """
    files = Files()
    tensors, common = agree(lambda: save_preprocess(state))
    agree(lambda: share_work(tensors, replicas or dist.group.WORLD))
    agree(lambda: _write_tensors(tensors, folder, files))
    if dist.get_rank() == 0:
        agree(lambda: _write_common(common, folder, files))
    else:
        agree(lambda: None)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, files.records)
    return {name: record for records in everyone for name, record in sorted(records.items())}


def share_work(tensors: dict[str, Any], replicas: Any) -> None:
    """Choose, for each tensor that several ranks hold, the one that writes it (collective over `replicas`): alike in bytes, whole tensors.

    The parts of a distributed optimizer, which are in no regular grid, have one holder each.
    """
    held = [each for each in nested_values(tensors) if isinstance(each, ShardedTensor) and each.has_regular_grid]
    distribution = determine_main_replica_uniform_distribution(held, replicas)
    distribute_main_replicas_with_precomputed_distribution(held, replicas, distribution)


def _write_tensors(tensors: dict[str, Any], folder: Path, files: Files) -> None:
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    _save_state_dict(torch_dist.mcore_to_pyt_state_dict(by_key), Writer(folder, files), planner=planner)


def _write_common(common: dict[str, Any], folder: Path, files: Files) -> None:
    with files.create_stream(folder / COMMON_STATE_FNAME, "wb") as stream:
        torch.save(common, stream)
    with files.create_stream(folder / CONFIG_FNAME, "wb") as stream:
        stream.write(json.dumps(asdict(CheckpointingConfig(BACKEND))).encode())


def read(state: dict[str, Any], folder: Path, files: Mapping[str, FileRecord]) -> dict[str, Any]:
    """Load into a sharded state dict (collective), resharding as it asks. The files must have been verified.

    Args:
        files: what the manifest lists; nothing else in the folder is opened.

    Raises RankFailure on all ranks if reading failed on any: a tensor missing or of another shape, a state of the optimizer that nothing asks
    for, a pickle that names what it must not.
    """
    metadata, common = agree(lambda: (_read_metadata(folder, files), _read_common(folder, files)))
    if "optimizer" in state:  # it is not where the weights alone are read
        agree(lambda: _require_states(state, metadata))
    load = _LoadTensors(metadata)
    return agree(
        lambda: dist_checkpointing.load(state, str(folder), sharded_strategy=load, common_strategy=_LoadCommon(common))
    )


def keys(folder: Path, files: Mapping[str, FileRecord]) -> frozenset[str]:
    """The keys of a verified checkpoint's tensors and objects. Raises UnpicklingError."""
    return frozenset(_read_metadata(folder, files).state_dict_metadata)


def _read_metadata(folder: Path, files: Mapping[str, FileRecord]) -> Metadata:
    _listed(METADATA, files)
    metadata = load_metadata(folder / METADATA)
    for info in metadata.storage_data.values():
        _listed(info.relative_path, files)
    return metadata


def _read_common(folder: Path, files: Mapping[str, FileRecord]) -> dict[str, Any]:
    for name in (COMMON_STATE_FNAME, CONFIG_FNAME):
        _listed(name, files)
    try:
        return torch.load(folder / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f"{folder / COMMON_STATE_FNAME} is refused: {_first_line(error)}") from None


def _require_states(state: dict[str, Any], metadata: Metadata) -> None:
    """Refuse states of the optimizer that no rank asks for (collective): Megatron would leave them out without a word."""
    everyone: list = [None] * dist.get_world_size()
    asked = {str(getattr(entry, "key", "")) for entry in nested_values(state)}
    dist.all_gather_object(everyone, {key for key in asked if key.startswith(STATES)})
    lost = {key for key in metadata.state_dict_metadata if key.startswith(STATES)}.difference(*everyone)
    if lost:
        names = ", ".join(sorted({key.removeprefix(STATES).partition(".")[0] for key in lost}))
        raise CheckpointError(
            f"its optimizer states {names} would be lost: the optimizer of this run does not make them in its first step; take the optimizer "
            "that wrote them, and have it make all its states there"
        )


def _listed(name: str, files: Mapping[str, FileRecord]) -> None:
    if name not in files:
        raise pickle.UnpicklingError(f"{name} is not listed in the manifest")


def _first_line(error: Exception) -> str:
    """torch's explanation of weights_only is a page, and advises to switch it off."""
    lines = [line.strip() for line in str(error).splitlines() if "nsupported" in line or "WeightsUnpickler" in line]
    return lines[0] if lines else str(error).splitlines()[0]


class _LoadCommon(TorchCommonLoadStrategy):
    """Gives what was read already, with restrictions."""

    def __init__(self, common: dict[str, Any]) -> None:
        self.common = common

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return self.common


class _LoadTensors(torch_dist.TorchDistLoadShardedStrategy):
    """Megatron's strategy over the restricted reader; tensors must have the shape that was saved, even where Megatron would pad."""

    def __init__(self, metadata: Metadata) -> None:
        super().__init__()
        self.cached_global_metadata = metadata

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        by_key, flat, renamed = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors = [entry for entry in nested_values(sharded_state_dict) if isinstance(entry, ShardedTensor)]
        state = torch_dist.mcore_to_pyt_state_dict(by_key, is_loading=True)
        reader = Reader(checkpoint_dir, self.cached_global_metadata)
        _load_state_dict(state, reader, planner=_Planner(shapes_validation_sharded_tensors=tensors))
        loaded = {key: torch_dist._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        result = torch_dist._replace_sharded_keys_with_state_dict_keys(loaded, flat, renamed)
        torch_dist._restore_dict_types(result, sharded_state_dict)
        return result


class _Planner(torch_dist.MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """torch's planner unpickles byte objects without restriction."""
        name = read_item.dest_index.fqn
        try:
            data = torch.load(value, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(f"the object {name} is refused: {_first_line(error)}") from None
        set_element(self.original_state_dict, self.mappings[name], data)
