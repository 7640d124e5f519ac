"""What a checkpoint holds of Megatron's engine: model chunks, with the states of their modules, optimizer and schedule."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from lsys.checkpoint import optimizer as adam
from lsys.checkpoint.shards import in_place, in_shards

# What the fp32 copies of parameters are called, before the parameter's own key: by the plain optimizer, and by the distributed one.
MASTERS = ("optimizer.state.fp32_param.", "optimizer.state.param.")


def sharded(chunks: Sequence[Any], optimizer: Any, scheduler: Any, replicas: Any, *, loading: bool) -> dict[str, Any]:
    """The state by keys of whole tensors: layers are numbered over all stages and chunks.

    Args:
        replicas: the data x context ranks.
    """
    metadata = {
        "dp_cp_group": replicas,
        "distrib_optim_sharding_type": "fully_reshardable",  # by keys of whole tensors, so that every degree may change; `in_shards` gives parts
        "chained_optim_avoid_prefix": True,
    }
    adam.allocate(optimizer)
    model = {f"model{index}": chunk.module.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    with adam.own_hyperparameters(optimizer), in_shards(optimizer):
        states = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    state = {**model, "optimizer": states, "scheduler": scheduler.state_dict()}
    if loading:
        in_place(state)
    return state


def put(chunks: Sequence[Any], optimizer: Any, scheduler: Any, loaded: dict[str, Any]) -> None:
    """Take what was loaded; the settings of the optimizer's groups stay the configuration's."""
    with adam.own_hyperparameters(optimizer), in_shards(optimizer):
        for index, chunk in enumerate(chunks):
            chunk.module.load_state_dict(loaded[f"model{index}"], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        adam.separate_steps(optimizer)
    scheduler.num_steps = 0  # Megatron adds the loaded count to its own
    scheduler.load_state_dict(loaded["scheduler"])  # after the groups have the configuration's learning rates again


def weights(chunks: Sequence[Any], replicas: Any, stored: Container[str]) -> dict[str, Any]:
    """What a checkpoint is to fill of the model alone: parameters in fp32, of the optimizer's copies where it has them; states of modules.

    Args:
        replicas: the data x context ranks.
        stored: keys of the checkpoint.
    """
    found = {}
    for index, chunk in enumerate(chunks):
        parameters = {parameter.data_ptr() for parameter in chunk.module.parameters()}
        state = chunk.module.sharded_state_dict(metadata={"dp_cp_group": replicas})
        for name, entry in state.items():
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and entry.data.data_ptr() in parameters:
                state[name] = _in_fp32(entry, stored)
        found[f"model{index}"] = state
    return found


def _in_fp32(
    entry: ShardedTensor | ShardedTensorFactory, stored: Container[str]
) -> ShardedTensor | ShardedTensorFactory:
    parts = [entry] if isinstance(entry, ShardedTensor) else list(nested_values(entry.build()))
    prefix = next((name for name in MASTERS if all(f"{name}{part.key}" in stored for part in parts)), "")
    key, data = f"{prefix}{entry.key}", torch.empty_like(entry.data, dtype=torch.float32)
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, key=key, data=data)
    return replace(entry, key=key, data=data, dtype=data.dtype)


def put_weights(chunks: Sequence[Any], optimizer: Any, loaded: dict[str, Any]) -> None:
    """Take `weights`, filled: into the parameters, and into the fp32 copies that the optimizer made of them when it was built."""
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[f"model{index}"], strict=True)
    optimizer.reload_model_params()  # from the parameters, which may be rounded
    with torch.no_grad():
        for index, chunk in enumerate(chunks):
            for name, parameter in chunk.module.named_parameters():
                for master, part in _masters(parameter, optimizer):
                    master.copy_(loaded[f"model{index}"][name].view(-1)[part].view(master.shape))


def _masters(parameter: Any, optimizer: Any) -> Iterator[tuple[torch.Tensor, slice]]:
    """The fp32 copy of a parameter on this rank, if there is one, and which of its numbers, flat, the copy has."""
    master = getattr(parameter, "main_param", None)
    if master is None:
        return
    if not getattr(parameter, "main_param_sharded", False):
        yield master, slice(None)
        return
    for each in optimizer.chained_optimizers:
        if parameter in getattr(each, "model_param_gbuf_map", ()):
            part = each._get_model_param_range_map(parameter)["param"]
            yield master, slice(part.start, part.end)
