"""Optimizers and schedules as users bring them, right ones and wrong ones, by what each keeps and where."""

import enum
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

Make = Callable[[list[dict[str, Any]], Any], torch.optim.Optimizer]


def optimizer(prepare: Callable[[Any], Any] = lambda made: None, **held: Any) -> Callable[[Any], Make]:
    """What makes an optimizer of update(optimizer, group, parameter, state); its groups hold `held`."""

    def of(update: Callable[[Any, dict, torch.Tensor, dict], Any]) -> Make:
        class Brought(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure: Any = None) -> None:  # type: ignore[override]
                for group in self.param_groups:
                    for parameter in group["params"]:
                        update(self, group, parameter, self.state[parameter])

        def make(groups: list[dict[str, Any]], options: Any) -> torch.optim.Optimizer:
            made = Brought(groups, held)
            prepare(made)
            return made

        return make

    return of


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def descend(group: dict, parameter: torch.Tensor, scale: Any = 1.0) -> None:
    parameter.sub_(gradient(parameter) * (group["lr"] * scale))


def momentum(state: dict, parameter: torch.Tensor, name: Any = "momentum") -> torch.Tensor:
    return state.setdefault(name, torch.zeros_like(parameter)).mul_(0.9).add_(gradient(parameter))


# ---- right


@optimizer()
def whole_norm(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    """Momentum of gradients over the norm of the whole matrix, which tensor ranks may share out."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    square = gradient(parameter).square().sum()
    if getattr(parameter, "tensor_model_parallel", False):
        dist.all_reduce(square, group=get_tensor_model_parallel_group())
    kept = state.setdefault("momentum", torch.zeros_like(parameter))
    kept.mul_(0.9).add_(gradient(parameter) / (square.sqrt() + 1e-6))
    parameter.sub_(kept * group["lr"] * group["wd_mult"])


@optimizer()
def world_norm(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    square = gradient(parameter).square().sum()
    dist.all_reduce(square)
    descend(group, parameter, 1 / (square.sqrt() + 1e-6))


@optimizer(prepare=lambda made: setattr(made, "noise", torch.zeros(2)))
def random(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    """Of torch's random numbers, which checkpoints hold; an attribute that stays, a count of steps."""
    state["step"] = state.get("step", 0) + 1
    descend(group, parameter, torch.rand(()) / state["step"])


def numpy_rate(step: int) -> Any:
    return np.interp(step, [0, 2, 10], [0.1, 1.0, 0.0])


def python_rate(step: int) -> float:
    return float(numpy_rate(step))


def short_rate(step: int) -> Any:
    return np.float32(0.5)


def negative_rate(step: int) -> float:
    return -1.0


# ---- no optimizers


def plain(groups: list[dict[str, Any]], options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups)


def regroups(groups: list[dict[str, Any]], options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=options.lr)


def fails(groups: list[dict[str, Any]], options: Any) -> Any:
    raise OSError("no")


def nothing(groups: list[dict[str, Any]], options: Any) -> None:
    return None


class bare(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], options: Any) -> None: ...


class odd(torch.optim.SGD):
    def __init__(self, groups: list[dict[str, Any]], options: Any) -> None:
        super().__init__(groups, lr=0.1)
        self.param_groups = [{}]


@optimizer()
def third_raises(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    state["step"] = state.get("step", 0) + 1
    if state["step"] == 3:
        raise OSError("no table")


COUNTED: list[int] = []


def second_raises(groups: list[dict[str, Any]], options: Any) -> torch.optim.SGD:
    COUNTED.append(0)
    return torch.optim.SGD(groups) if len(COUNTED) == 1 else fails(groups, options)


# ---- states that checkpoints do not hold


@optimizer()
def row(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    state["row"] = parameter.sum(-1)


@optimizer()
def none(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    state["momentum"] = None


def _named(name: Any) -> Make:
    def update(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
        parameter.sub_(momentum(state, parameter, name) * group["lr"])

    return optimizer()(update)


named_s, named_ste, named_p, named_empty, named_0, named_fp32_param = map(
    _named, ("s", "ste", "p", "", 0, "fp32_param")
)


@optimizer()
def entry(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    made.state["shared"] = {"k": 1}


@optimizer()
def shaped_step(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    state.setdefault("step", torch.zeros_like(parameter)).add_(1)


@optimizer()
def numpy_step(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    state["step"] = np.float64(state.get("step", 0)) + 1


@optimizer()
def other_step(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    state.setdefault("step", torch.zeros(1)).add_(parameter.dim())


@optimizer()
def some_step(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    if parameter.dim() > 1:
        state.setdefault("step", torch.zeros(())).add_(1)


@optimizer()
def late(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    """Slow weights from the fifth step on."""
    state["step"] = state.get("step", 0) + 1
    if state["step"] >= 5:
        state.setdefault("slow", parameter.clone())
    descend(group, parameter)


@optimizer()
def gone(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    if state.setdefault("momentum", torch.zeros_like(parameter)).add_(1).max() > 1:
        del state["momentum"]


# ---- what is kept elsewhere


@optimizer(k=0)
def counts_in_groups(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    group["k"] += 1
    descend(group, parameter, 1 / group["k"])


@optimizer()
def own_decay(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    group["weight_decay"] *= 0.5
    descend(group, parameter, 1 + group["weight_decay"])


@optimizer()
def counts(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    made.count = getattr(made, "count", 0) + 1
    descend(group, parameter, 1 / made.count)


@optimizer(
    prepare=lambda made: setattr(made, "kept", {"a": [deque([0]), SimpleNamespace(sum=torch.zeros(1)), np.zeros(1)]})
)
def counts_inside(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    made.kept["a"][1].sum += 1


@optimizer(prepare=lambda made: setattr(made, "kept", [deque(["a"])]))
def counts_in_a_deque(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    made.kept[0][0] += "a"


@optimizer(prepare=lambda made: setattr(made, "kept", {np.zeros(1).tobytes(): np.zeros(1)}))
def counts_in_an_array(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    made.kept[next(iter(made.kept))][0] += 1


COUNT = [0]


@optimizer()
def counts_in_the_module(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    COUNT[0] += 1
    descend(group, parameter, COUNT[0])


@optimizer(prepare=lambda made: setattr(made, "generator", torch.Generator().manual_seed(0)))
def own_random(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    descend(group, parameter, torch.rand((), generator=made.generator))


@optimizer()
def inverse_rate(made: Any, group: dict, parameter: torch.Tensor, state: dict) -> None:
    parameter.sub_(momentum(state, parameter) / (1 / group["lr"]))


# ---- what groups hold


class Mode(enum.Enum):
    FAST = 1


def _holding(value: Any) -> Make:
    return optimizer(mode=value)(lambda made, group, parameter, state: descend(group, parameter))


holds_enum, holds_numpy, holds_function = map(_holding, (Mode.FAST, np.float64(0.5), lambda step: step))
