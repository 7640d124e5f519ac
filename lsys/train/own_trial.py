"""A trial of the user's own optimizer before a run's process groups start: what a checkpoint would lose, or fail on, is refused.

It takes steps with a small matrix and a small vector, as the only rank of a world: what it communicates comes back at once. Then
another one, made anew and given what a checkpoint keeps of the first, has to take the same step.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

from lsys.config.messages import FilesError, Mistake
from lsys.config.schema import ADAMW, Optimizer
from lsys.train.own import allocate, make

STEPS = 12  # slow weights and the like are made after a few; what is made later still is refused on loading

REMEDY = "keep it in `state`, as a tensor of the parameter's shape and type, or, if it counts the steps, as `step`"


def require_optimizer(options: Optimizer) -> None:
    """Let the user's own optimizer take steps with two small parameters, save, load and go on, before a process group starts.

    Raises:
        FilesError: it cannot be made or stepped, or keeps what a checkpoint cannot hold. Another node may have another copy.
    """
    if options.kind == ADAMW:
        return
    with one_rank(), torch.random.fork_rng(devices=[]):
        if problem := next(_problems(options), ""):
            raise FilesError([Mistake("optimizer.kind", problem)])


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Inside, this process is the only rank of Megatron's groups, and opens no socket (as gloo does); groups that run are left alone."""
    if dist.is_initialized():
        yield
        return
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Of one rank its collectives give what gloo's and NCCL's do.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _problems(options: Optimizer) -> Iterator[str]:
    """What is wrong with it, in words, as the trial goes on: what comes first may be the reason of all that follows."""
    one = Trial(options)
    if one.problem:
        yield one.problem
        return
    yield from _unread(one.optimizer)
    before, names = one.beside_state(), None
    for number in range(STEPS):
        if problem := one.step(number):
            yield problem
            return
        yield from _unsaved(one.optimizer)
        made = [{*state} for state in one.optimizer.state.values()]
        if names is not None and made != names:
            late = ", ".join(map(repr, sorted(set().union(*made) ^ set().union(*names)))) or "of some parameters"
            yield f"its states {late} come or go in step {number + 1}; a resumed run has those of the first step: make all of them there"
        names = made
    after = one.beside_state()
    if changed := [what for what in {**before, **after} if before.get(what) != after.get(what)]:
        yield f"its steps change {', '.join(changed)}, which a checkpoint does not keep; {REMEDY}"
    yield from _goes_on(one, options)


class Trial:
    """The optimizer over a small matrix and a small vector, in groups as those of a run.

    Attributes:
        problem: what is wrong with it, or "".
    """

    def __init__(self, options: Optimizer) -> None:
        self.options = options
        self.parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (3,))]
        set_tensor_model_parallel_attributes(self.parameters[0], True, 0, 1)
        peak = {"lr": options.lr, "max_lr": options.lr, "min_lr": options.min_lr}
        marks = {"default_config": True, "is_expert_parallel": False, "is_decoupled_lr": False, "lr_mult": 1.0}
        groups = [
            {"params": [each], **peak, **marks, "wd_mult": decay, "weight_decay": decay * options.weight_decay}
            for each, decay in zip(self.parameters, (1.0, 0.0), strict=True)
        ]
        self.optimizer, self.problem = make(groups, options)

    def step(self, number: int) -> str:
        """Take a step of this number, the same for all that take it; what it raised, in words, or ""."""
        torch.default_generator.manual_seed(number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr  # as Megatron's scheduler sets it for each step
        for each in self.parameters:
            each.grad = torch.linspace(-1, 2, each.numel()).view_as(each) / (1 + number % 3)
        try:
            self.optimizer.step()
        except Exception as error:
            return f"the step of {self.options.kind} raised {type(error).__name__}: {error}"
        return ""

    def beside_state(self) -> dict[str, Any]:
        """What the optimizer holds beside its states and parameters, by its name in a sentence, so that it can be compared."""
        optimizer = self.optimizer
        passed = {id(each) for each in (*self.parameters, optimizer.state, optimizer.param_groups)}
        found: dict[str, Any] = {}
        for group in optimizer.param_groups:
            for key in [key for key in group if key not in ("params", "lr")]:
                found.setdefault(f"{key!r} of its groups", []).append(_comparable(group[key], passed))
        attributes = {name: value for name, value in vars(optimizer).items() if id(value) not in passed}
        return found | {f"its attribute {name!r}": _comparable(value, passed) for name, value in attributes.items()}


def _comparable(value: Any, passed: set[int]) -> Any:
    """The content of a value, equal as long as that is; objects that have been passed are left out."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if id(value) in passed:
        return None
    passed = passed | {id(value)}
    if isinstance(value, torch.Tensor):
        return repr((value.dtype, value.tolist()))
    if isinstance(value, Mapping):
        return [(_comparable(key, passed), _comparable(each, passed)) for key, each in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return [_comparable(each, passed) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_comparable(each, passed)) for each in value)
    if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        return _comparable(vars(value), passed)
    try:
        return repr(torch.as_tensor(value).tolist())  # numpy's
    except Exception:
        return id(value)


def _unread(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """What of the groups is saved and then refused on loading, or cannot be saved, in words."""
    for group in optimizer.param_groups:
        for key in [key for key in group if key != "params"]:
            try:
                _through_file(group[key])
            except Exception:
                yield (
                    f"its groups hold {key!r}: {group[key]!r}; checkpoints keep them, as numbers, texts, lists, dicts and tensors of "
                    "Python's and torch's"
                )


def _through_file(value: Any) -> Any:
    """What a checkpoint gives back of a value."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _unsaved(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """What of the states a checkpoint cannot hold, in words."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = []
    for parameter, state in optimizer.state.items():
        if not any(parameter is each for each in parameters):
            yield f"its `state` has an entry {parameter!r}, which is no parameter; {REMEDY}"
            return
        for name, value in state.items():
            shape = list(parameter.shape)
            if name == "step":
                steps.append(value)
                if not _is_number(value):
                    yield f"its state 'step' is {_kind(value)}; checkpoints keep it as one number, equal for all parameters"
            # Megatron passes over names that are in "step", and calls its copies of parameters fp32_param.
            elif not isinstance(name, str) or name in "step" or name == "fp32_param":
                yield f"its state {name!r} has a name that checkpoints cannot keep; call it otherwise, such as 'momentum'"
            elif not (
                isinstance(value, torch.Tensor) and list(value.shape) == shape and value.dtype == parameter.dtype
            ):
                yield (
                    f"its state {name!r} is {_kind(value)} for a parameter {parameter.dtype} {shape}; checkpoints keep tensors of the "
                    "parameter's shape and type, and one `step` for all"
                )
    if steps and (len(steps) < len(parameters) or len({float(step) for step in steps}) > 1):
        yield "its state 'step' is not equal for all parameters; checkpoints keep one for all"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _goes_on(one: Trial, options: Optimizer) -> Iterator[str]:
    """Whether another one, made anew, goes on as `one` does from what a checkpoint keeps; what is wrong, in words."""
    two = Trial(options)
    if two.problem:
        yield f"a second time, {two.problem}"
        return
    try:
        allocate(two.optimizer)
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in two.optimizer.param_groups
        ]
        two.optimizer.load_state_dict(_through_file(one.optimizer.state_dict()))
    except Exception as error:
        yield f"{options.kind}, made anew, does not take the states of another: {type(error).__name__}: {error}"
        return
    for group, own in zip(two.optimizer.param_groups, groups, strict=True):
        group.update(own)
    for new, old in zip(two.parameters, one.parameters, strict=True):
        new.data.copy_(old.data)
    if problem := one.step(STEPS) or two.step(STEPS):
        yield problem
    elif not all(torch.allclose(a, b, 0, 0, True) for a, b in zip(one.parameters, two.parameters, strict=True)):
        yield f"{options.kind}, made anew with the states of another, takes another step: it keeps more than `state`; {REMEDY}"
