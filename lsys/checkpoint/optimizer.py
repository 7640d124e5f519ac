"""What megatron-core 0.16.1 needs so that torch's Adam survives a checkpoint; without it, resumed runs differ silently or fail.

It assumes the fused Adam of Apex or Transformer Engine, which counts steps once per group; torch's counts them per parameter.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
def own_hyperparameters(optimizer: Any) -> Iterator[None]:
    """Inside, the states of an optimizer may be loaded; afterwards its groups have the settings they had, not the checkpoint's.

    Megatron's groups carry their peak and final learning rates, which the scheduler prefers to its own: a changed learning rate in the
    configuration would be ignored.
    """
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)
