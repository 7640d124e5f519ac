"""Numbers that are not finite, planted into the passes of one step on one rank: what an engine or a run has to notice.

They arise in the computation itself, so a second run of the same micro-batches has them too, unless they are planted `once`.
"""

import math
from typing import Any

import torch


def plant(
    engine: Any, *, step: int, rank: int, parameter: str | int = 0, value: float = math.nan, once: bool = False
) -> str:
    """Make one number of a parameter's gradient (Megatron's `main_grad` of this rank) `value`, in each micro-batch of a step on one rank.

    Args:
        step: of the engine's, from 1.
        parameter: a part of its global name, or its place among the rank's parameters (modulo their number).
        once: not in the passes in which the engine looks for it.

    Returns:
        The parameter's global name; empty on other ranks, and where the rank has none of this name.
    """
    from lsys.train.origin import parameters

    held = [(name, each) for _, name, each in parameters(engine.chunks)]
    if isinstance(parameter, str):
        held = [each for each in held if parameter in each[0]]
    if engine.groups.launch.rank != rank or not held:
        return ""
    name, target = held[parameter % len(held) if isinstance(parameter, int) else 0]
    is_on = _in_step(engine, step, once)

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        if not is_on():
            return None
        changed = gradient.clone()
        changed.view(-1)[changed.numel() // 2] = value
        return changed

    target.register_hook(hook)
    return name


def plant_output(
    engine: Any, *, step: int, rank: int, module: str, value: float = math.nan, backward: bool = False
) -> str:
    """Make one number of a module's output, or of its output's gradient if `backward`, `value`, in each micro-batch of a step on one rank; the
    module's global name, or nothing.
    """
    from lsys.train.origin import place

    for chunk in engine.chunks if engine.groups.launch.rank == rank else ():
        for local, each in chunk.module.named_modules():
            _, name = place(chunk, local)
            if name.endswith(module):
                is_on = _in_step(engine, step, once=False)
                change = _change_gradient if backward else _changed
                each.register_forward_hook(lambda m, inputs, output: change(output, value) if is_on() else None)
                return name
    return ""


def _changed(output: Any, value: float) -> Any:
    if isinstance(output, tuple):
        return (_changed(output[0], value), *output[1:])
    changed = output.clone()
    changed.view(-1)[changed.numel() // 2] = value
    return changed


def _change_gradient(output: Any, value: float) -> None:
    (output[0] if isinstance(output, tuple) else output).register_hook(lambda gradient: _changed(gradient, value))


def _in_step(engine: Any, step: int, once: bool) -> Any:
    """Whether the passes that go on are of this step, as a question."""
    begun: list[int] = []
    original = engine._begin

    def begin(number: int) -> None:
        begun.append(number)
        original(number)

    engine._begin = begin
    return lambda: bool(begun) and begun[-1] == step and (not once or begun.count(step) == 1)
