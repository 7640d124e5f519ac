"""What one may bring to the loop: an observer, a schedule, an optimizer."""

import math
from typing import Any

import torch

from lsys.train.observers import StepDone, StepObserver


class LossLog(StepObserver):
    """Writes step, loss and learning rate into `train.folder`/losses.tsv, on the first rank."""

    def __init__(self, run: Any) -> None:
        self.path = run.settings.train.folder / "losses.tsv"
        self.writes = run.groups.launch.rank == 0

    def end_step(self, done: StepDone) -> None:
        if self.writes:
            with open(self.path, "a") as file:
                file.write(f"{done.step}\t{done.losses.mean:.6f}\t{done.lr:.6g}\n")


def inverse_root(step: int) -> float:
    """Warm-up over 4 steps, then 1 / sqrt(step); `step` steps have been done, 0 in the first."""
    return min((step + 1) / 4, math.sqrt(4 / (step + 1)))


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Lion: Chen et al., 2023), with decoupled weight decay."""

    def __init__(self, groups: list[dict[str, Any]], beta1: float, beta2: float) -> None:
        super().__init__(groups, {"beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                update = momentum.lerp(parameter.grad, 1 - group["beta1"]).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - group["beta2"])


def lion(groups: list[dict[str, Any]], options: Any) -> Lion:
    """The optimizer that `optimizer.kind` names; options are the section `optimizer`."""
    return Lion(groups, options.beta1, options.beta2)


lion.states = 1  # type: ignore[attr-defined]  # elements that it keeps for each of a parameter: `lsys check` counts memory by it
