"""Modules with a state that is no parameter: counts, running means, a router's bias.

The state is in persistent buffers (`register_buffer(name, tensor)`), of any type. A checkpoint holds them by their global names beside the
parameters, bit for bit. One of `register_buffer` is the same on all ranks that have the layer; one of `HeadParameters.add_state` is cut along
dim 0 over the tensor ranks, as parameters of heads are, and the same over the others. Both go to the device of the model. What it learns in a
step comes from what all ranks reported, which is equal on all of them; or the module communicates itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lsys.observe.values import Values


class StepModule(nn.Module):
    """Told when a step begins and ends, in training; on every rank and virtual chunk, in the order of the layers.

    In a forward pass it may add to its state too: where `self.training`, and not where `packed.is_recomputed`.
    """

    def begin_step(self, step: int) -> None:
        """Step `step`, from 1, begins: no micro-batch has been seen."""

    def end_step(self, step: int, values: Values) -> None:
        """The parameters have been updated; `values`: what all ranks reported in the step (on the host). Not called for an update that was not
        applied: persistent buffers are then put back to what they were before the step, and the next step begins.
        """


class StepHooks:
    """A module's two methods, without gradients; either may be missing."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def begin_step(self, step: int) -> None:
        with torch.no_grad():
            getattr(self.module, "begin_step", _nothing)(step)

    def end_step(self, step: int, values: Values) -> None:
        with torch.no_grad():
            getattr(self.module, "end_step", _nothing)(step, values)


def _nothing(*unused: object) -> None:
    pass


def step_hooks(chunk: nn.Module) -> Iterator[StepHooks]:
    """The modules of a model chunk that have `begin_step` or `end_step`, with or without `StepModule`."""
    return (StepHooks(each) for each in chunk.modules() if hasattr(each, "begin_step") or hasattr(each, "end_step"))


def persistent_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name, buffer) of all states in a model that are no parameters; a buffer of several modules comes once."""
    seen: set[int] = set()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield module, name, buffer


def persistent(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and persistent buffers, not those of modules in it."""
    held: dict[str, Tensor] = {}
    module._save_to_state_dict(held, "", keep_vars=True)
    return held
