"""Where a number that is not finite arose: the parameter, module or loss, and its rank.

After the sum over ranks all of them hold it. So the step's micro-batches are run once more, and what each rank computes by itself is looked at.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from lsys.config.reports import LOSS, Z_LOSS
from lsys.model.module_state import persistent_buffers
from lsys.train.finite import first_not_finite

if TYPE_CHECKING:
    from lsys.data.plan import RankBatch
    from lsys.train.engine import Engine

FIRST, LAST = -1, 1 << 30  # layer numbers of the embedding, and of what is behind the layers
Key = tuple[int, int]  # smaller: nearer to where it arose


@dataclass(frozen=True)
class StepStart:
    """What passes of a step change beside gradients: random generators and states of modules, as they were before."""

    generators: tuple[Any, ...]
    buffers: Sequence[tuple[nn.Module, str, Tensor]]

    @classmethod
    def of(cls, chunks: Sequence[nn.Module]) -> StepStart:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        found = (torch.get_rng_state(), cuda, get_cuda_rng_tracker().get_states())
        held = [(module, name, buffer.clone()) for c in chunks for module, name, buffer in persistent_buffers(c)]
        return cls(found, held)

    @torch.no_grad()
    def restore_states(self) -> None:
        for module, name, kept in self.buffers:
            getattr(module, name).copy_(kept)

    def restore(self) -> None:
        """States and generators."""
        self.restore_states()
        cpu, cuda, tracked = self.generators
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        get_cuda_rng_tracker().set_states(dict(tracked))


@contextlib.contextmanager
def without_reduction(config: Any, chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, Megatron's schedules leave on each rank the gradients of its own passes, with overlap and interleaved stages too."""
    kept = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func, config.no_sync_func = None, contextlib.nullcontext
    try:
        with contextlib.ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = kept


def place(chunk: Any, name: str) -> tuple[int, str]:
    """(layer, name) over all stages, of a module's or parameter's name in a chunk; layers are counted from 0, as in checkpoints."""
    head, _, rest = name.partition("decoder.layers.")
    if head or not rest:
        return (FIRST if name.startswith("embedding") else LAST), name
    local, _, rest = rest.partition(".")
    layer = chunk.module.decoder.layers[int(local)].layer_number - 1
    return layer, f"decoder.layers.{layer}.{rest}".rstrip(".")


def parameters(chunks: Sequence[Any]) -> Iterator[tuple[int, str, nn.Parameter]]:
    """(layer, global name, parameter) of the rank."""
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            yield *place(chunk, name), parameter


class Watch:
    """The first outputs of modules, and the first gradients of parameters, that are not finite on this rank, in the passes inside.

    Forward, the first is the one nearest to the embedding; backward, nearest to the loss.

    Args:
        forward: whether outputs are looked at; each costs a wait for the device.
    """

    def __init__(self, chunks: Sequence[Any], forward: bool) -> None:
        self.chunks, self.forward = chunks, forward
        self.output: tuple[Key, str] | None = None
        self.gradient: tuple[Key, str] | None = None
        self._calls: Counter[tuple[str, int]] = Counter()  # of (direction, layer): the same on all ranks of a stage
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for layer, name, parameter in parameters(self.chunks):
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._of_gradient(layer, name)))
        for chunk in self.chunks if self.forward else ():
            for name, module in chunk.module.named_modules():
                self._handles.append(module.register_forward_hook(self._of_output(*place(chunk, name))))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _of_gradient(self, layer: int, name: str) -> Any:
        def hook(gradient: Tensor) -> None:
            self._calls["back", layer] += 1
            key = -layer, self._calls["back", layer]
            if (self.gradient is None or key < self.gradient[0]) and not gradient.isfinite().all():
                self.gradient = key, name

        return hook

    def _of_output(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._calls["on", layer] += 1
            key = layer, self._calls["on", layer]
            if (self.output is None or key < self.output[0]) and not all(
                each.isfinite().all() for each in _tensors(output)
            ):
                self.output = key, name

        return hook


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output.detach()
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _tensors(each)


def find(engine: Engine, batches: Sequence[RankBatch], is_loss_finite: bool) -> str:
    """Where the last step's loss or gradients that are not finite arose, in words, equal on all ranks (collective). See `TrainingEngine`."""
    held = list(parameters(engine.chunks))
    own: dict[str, Any] = {"summed": _gradient(held), "largest": _largest(held)}
    own["value"] = _value(held)
    with Watch(engine.chunks, forward=not is_loss_finite) as watch:
        sums = engine.rerun(batches).sums
    own["gradient"], own["output"] = watch.gradient or _gradient(held), watch.output
    slots = engine.slots.sums
    own["loss"] = not all(bool(sums[slots[name]].isfinite().all()) for name in (LOSS, Z_LOSS))
    everywhere: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return sentence(everywhere, is_loss_finite)


def sentence(everywhere: Sequence[dict[str, Any]], is_loss_finite: bool) -> str:
    """What the ranks found, by rank, in words: cause before effect."""

    def first(what: str) -> tuple[str, str]:
        found = {rank: own[what] for rank, own in enumerate(everywhere) if own[what]}
        if not found:
            return "", ""
        nearest = min(found.values())
        return nearest[1], _on([rank for rank, each in found.items() if each == nearest])

    name, where = first("value")
    if name:
        return f"the parameter {name} is not finite{where}"
    name, where = first("output")
    if name:
        return f"the output of {name} is not finite{where}"
    if not is_loss_finite:
        where = _on([rank for rank, own in enumerate(everywhere) if own["loss"]])
        again = "; it did not arise again as the step's micro-batches were run once more"
        return f"the loss is not finite{where}" if where else f"the loss was not finite{again}"
    name, where = first("gradient")
    if name:
        return f"the gradient of {name} is not finite{where}"
    name, where = first("summed")
    if name:
        alone = (
            "no rank's own is, as the step's micro-batches were run once more: a passing fault, or a sum that overflows"
        )
        return f"the gradient of {name} was not finite{where} after the sum over ranks; {alone}"
    rank, (size, name) = max(enumerate(own["largest"] for own in everywhere), key=lambda each: each[1])
    return f"every gradient is finite and their norm is not; the largest, {size:.3g}, is of {name}{_on([rank])}"


def _on(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f" on rank{'s' if len(ranks) > 1 else ''} {listed}"


Held = Sequence[tuple[int, str, nn.Parameter]]


def _value(held: Held) -> tuple[Key, str] | None:
    name = first_not_finite((name, parameter.detach()) for _, name, parameter in held)
    return next((((layer, 0), name) for layer, found, _ in held if found == name), None)


def _gradient(held: Held) -> tuple[Key, str] | None:
    """The first of the sums that Megatron keeps which is not finite; so many sums of finite ones can overflow."""
    backward = sorted(enumerate(held), key=lambda each: (-each[1][0], -each[0]))
    found = first_not_finite((name, p.main_grad) for _, (_, name, p) in backward if hasattr(p, "main_grad"))
    return next((((-layer, -index), name) for index, (layer, name, _) in backward if name == found), None)


def _largest(held: Held) -> tuple[float, str]:
    sizes = [(float(p.main_grad.abs().max()), name) for _, name, p in held if hasattr(p, "main_grad") and p.numel()]
    return max(sizes, key=lambda each: each[0] if math.isfinite(each[0]) else -1.0, default=(-1.0, ""))
