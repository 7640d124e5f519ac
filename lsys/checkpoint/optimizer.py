"""What megatron-core 0.16.1 needs so that torch's Adam survives a checkpoint; without it, resumed runs differ silently or fail.

It assumes the fused Adam of Apex or Transformer Engine, which counts steps once per group; torch's counts them per parameter.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def _sub_optimizers(optimizer: Any) -> list[Any]:
    """The Megatron optimizers of a chain that hold parameters and drive torch's Adam, of Megatron's making."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    kinds = (torch.optim.Adam, torch.optim.AdamW)
    return [each for each in chained if isinstance(each.optimizer, kinds) and not getattr(each, "is_own", False)]


def allocate(optimizer: Any) -> None:
    """Give every parameter the state that Adam would make in its first step.

    Before loading, Megatron asks for the common step of all parameters (DistributedOptimizer), which have none yet.
    """
    for each in _sub_optimizers(optimizer):
        for parameter in (p for group in each.optimizer.param_groups for p in group["params"]):
            if not each.optimizer.state[parameter]:
                each.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def separate_steps(optimizer: Any) -> None:
    """Give every parameter a step count of its own after loading.

    Megatron puts one tensor into all of them; Adam adds 1 to it once per parameter, and its bias correction is wrong
    from then on.
    """
    for each in _sub_optimizers(optimizer):
        for state in each.optimizer.state.values():
            state["step"] = state["step"].clone()


@contextlib.contextmanager
def without_step_per_parameter(optimizer: Any) -> Iterator[None]:
    """Inside, DistributedOptimizer takes parameter states that hold no step.

    It copies every entry that Adam keeps for a parameter from what was loaded; the step is not there, since it is stored once for all.
    """
    distributed = [each for each in _sub_optimizers(optimizer) if isinstance(each, DistributedOptimizer)]
    for each in distributed:
        each._set_main_param_and_optimizer_states = _completed(each)
    try:
        yield
    finally:
        for each in distributed:
            del each._set_main_param_and_optimizer_states  # the class's shows again


def _completed(optimizer: DistributedOptimizer) -> Any:
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(parameter: Any, loaded: dict[str, Any]) -> None:
        original(parameter, {**optimizer._get_main_param_and_optimizer_states(parameter), **loaded})

    return set_states


@contextlib.contextmanager
def positions_without_padding(optimizer: Any) -> Iterator[None]:
    """Inside, the buffers of DistributedOptimizer say where parameters lie if no bucket is padded.

    Megatron gathers its states without the padding at the end of each bucket, then cuts them at positions that count it: from the
    second bucket on every state is stored shifted. There are several with tied embeddings over pipeline stages, or overlap.
    """
    distributed = [each for each in _sub_optimizers(optimizer) if isinstance(each, DistributedOptimizer)]
    buffers = [buffer for each in distributed for buffer in each.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        buffer.param_index_map = _unpadded(buffer)
    try:
        yield
    finally:
        for buffer, positions in zip(buffers, padded, strict=True):
            buffer.param_index_map = positions


def _unpadded(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    shifts, end = [], 0
    for bucket in buffer.buckets:
        shifts.append(bucket.offset - end)
        end += bucket.numel_unpadded
    return {
        parameter: (start - shifts[bucket], stop - shifts[bucket], bucket)
        for parameter, (start, stop, bucket) in buffer.param_index_map.items()
    }


@contextlib.contextmanager
def own_hyperparameters(optimizer: Any) -> Iterator[None]:
    """Inside, the states of an optimizer may be loaded; afterwards its groups have the settings they had, not the checkpoint's.

    Megatron's groups carry their peak and final learning rates, which the scheduler prefers to its own: a changed learning rate in the
    configuration would be ignored.
    """
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
