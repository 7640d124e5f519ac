"""What a checkpoint holds of Megatron's engine: model chunks, with the states of their modules, optimizer and schedule."""

from collections.abc import Sequence
from typing import Any

from lsys.checkpoint import optimizer as adam


def sharded(chunks: Sequence[Any], optimizer: Any, scheduler: Any, replicas: Any, *, loading: bool) -> dict[str, Any]:
    """The state by keys of whole tensors: layers are numbered over all stages and chunks.

    Args:
        replicas: the data x context ranks.
    """
    metadata = {
        "dp_cp_group": replicas,
        "distrib_optim_sharding_type": "fully_reshardable",  # whole tensors, so that every degree may change
        "chained_optim_avoid_prefix": True,
    }
    adam.allocate(optimizer)
    model = {f"model{index}": chunk.module.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    with adam.own_hyperparameters(optimizer), adam.positions_without_padding(optimizer):
        states = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {**model, "optimizer": states, "scheduler": scheduler.state_dict()}


def put(chunks: Sequence[Any], optimizer: Any, scheduler: Any, loaded: dict[str, Any]) -> None:
    """Take what was loaded; the settings of the optimizer's groups stay the configuration's."""
    with adam.own_hyperparameters(optimizer), adam.without_step_per_parameter(optimizer):
        for index, chunk in enumerate(chunks):
            chunk.module.load_state_dict(loaded[f"model{index}"], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        adam.separate_steps(optimizer)
    scheduler.num_steps = 0  # Megatron adds the loaded count to its own
    scheduler.load_state_dict(loaded["scheduler"])  # after the groups have the configuration's learning rates again
