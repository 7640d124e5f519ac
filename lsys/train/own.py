"""An optimizer and a schedule of the user's own, in the places of Megatron's.

The optimizer is made by `make(groups, options)` of `optimizer.kind`: groups as torch's optimizers take them, with `params`, `lr`, `weight_decay`
and marks of Megatron's; options are the section `optimizer`. It gives a `torch.optim.Optimizer` over the same groups. Megatron's wrapper
stays around it: gradients are summed over ranks, clipped and, in bf16, handed over in fp32 with the fp32 copies of parameters that it
updates. It sees a rank's piece of each parameter; what is no function of each number alone has to communicate.

Its states are saved as Megatron shards parameters: tensors of the parameter's shape and type, and one `step` for all. Nothing else of it is
saved: `own_trial` sees to it that there is nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lsys.config import Config
from lsys.config.messages import FilesError, Mistake
from lsys.config.rules import is_factor
from lsys.config.schema import ADAMW, Optimizer
from lsys.config.user_code import imported, is_path
from lsys.train.schedule import Schedule


def take_over(optimizer: Any, options: Optimizer) -> None:
    """Put the user's own optimizer in the place of each AdamW that Megatron's wrappers hold; nothing where `optimizer.kind` is that.

    Raises:
        FilesError: it is no optimizer over the groups that it was given.
    """
    if options.kind == ADAMW:
        return
    for each in optimizer.chained_optimizers:
        if each.optimizer is None:  # a stage without parameters
            continue
        adams = each.optimizer.defaults.keys() - {"lr", "weight_decay"}
        groups = [{key: value for key, value in g.items() if key not in adams} for g in each.optimizer.param_groups]
        made, problem = make(groups, options)
        if problem:
            raise FilesError([Mistake("optimizer.kind", problem)])
        each.optimizer, each.init_state_fn, each.is_own = made, allocate, True


def make(groups: list[dict[str, Any]], options: Optimizer) -> tuple[Any, str]:
    """(the optimizer, what is wrong with it or "")."""
    given = [[id(parameter) for parameter in group["params"]] for group in groups]
    try:
        made = imported(options.kind)(groups, options)
    except Exception as error:
        return None, f"{options.kind}(groups, options) raised {type(error).__name__}: {error}"
    if not isinstance(made, torch.optim.Optimizer):
        return None, f"{options.kind} gives a {type(made).__name__}; it has to be a torch.optim.Optimizer"
    if not all(hasattr(made, name) for name in ("param_groups", "state")):
        return (
            None,
            f"{options.kind} has no param_groups and state; its __init__ has to call super().__init__(groups, defaults)",
        )
    try:
        kept = [[id(parameter) for parameter in group["params"]] for group in made.param_groups]
    except (TypeError, KeyError):
        kept = []
    if kept != given:
        return None, f"{options.kind} has other groups than it was given; it has to keep them, in their order"
    return made, ""


def allocate(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give parameters the states that the first step makes, before a checkpoint is loaded into them and into the parameters.

    By a step without gradients at a learning rate of 0, as torch's own `distributed.checkpoint` does.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        parameter.grad = None


class OwnSchedule(OptimizerParamScheduler):
    """Learning rate = factor(steps done) x `optimizer.lr`, with a factor of the user's own.

    Args:
        path: of the factor, for each step from 0 to `last`; the same whenever it is asked, so a resumed run goes on exactly.
    """

    def __init__(self, path: str, last: int, *arguments: Any, **named: Any) -> None:
        self.path, self.last = path, last
        self.factor: Callable[[int], float] = imported(path)
        super().__init__(*arguments, **named)

    def get_lr(self, param_group: dict) -> float:
        step = min(self.num_steps, self.last)  # Megatron asks once more after the last step
        found = self.factor(step)
        if not is_factor(found):
            problem = f"{self.path}({step}) is {found!r}"
            raise FilesError(
                [Mistake("optimizer.schedule", problem, "a factor of optimizer.lr is a number of 0 or more")]
            )
        peak: Any = param_group.get("max_lr", self.max_lr)
        return float(found) * peak  # groups are saved, and a checkpoint holds no number of numpy's


def scheduler_class(settings: Config) -> Callable[..., OptimizerParamScheduler]:
    """One of lsys's schedules, or the user's own in their form."""
    path = settings.optimizer.schedule
    if not is_path(path):
        return Schedule
    return functools.partial(OwnSchedule, path, settings.train.steps - 1)
