"""A training step of a configuration at any number of ranks, as one of them: real plans, Megatron and lsys, nothing computed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.symbolic import guard
from bench.symbolic.device import Device, pretend
from bench.symbolic.group import Groups
from bench.symbolic.mode import Symbolic
from bench.symbolic.parts import follow
from bench.symbolic.stores import stored
from bench.symbolic.watch import Watch

RANKS_OF_NODE = 8


def prepare() -> Symbolic:
    """This process takes itself for one with a GPU, for the rest of its life. Once in a process, and before it imports Megatron."""
    device, watch = Device(guard.install()), Watch()
    pretend(device)
    device.stopped = watch.stopped
    mode = Symbolic(device, watch)
    _replace_methods(mode)
    from lsys.runtime import install_megatron

    install_megatron()
    return mode


@contextlib.contextmanager
def one_of(mode: Symbolic, rank: int, world_size: int) -> Iterator[Groups]:
    """Inside, this process is one rank of the default group, and its tensors on CUDA have no numbers."""
    mode.device.choose(rank % RANKS_OF_NODE)
    with torch.autograd.set_multithreading_enabled(False):
        groups = Groups(mode, rank, world_size)
        with mode:
            yield groups


def _replace_methods(mode: Symbolic) -> None:
    """What torch's Python asks a CUDA device for beside its operations."""
    c: Any = torch._C
    c._ensureCUDADeviceGuardSet = lambda: None
    c._set_only_lift_cpu_tensors(True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm", _never, "CUDA")  # one kernel with CUDA; without a kernel it would come in parts
    kept: Any = mode
    kept.library = library
    tensor: Any = Tensor
    pointer = tensor.data_ptr
    tensor.data_ptr = lambda x: (
        mode.address(x) if mode.memories.get(x.untyped_storage()._cdata) and x.is_cuda else pointer(x)
    )
    tensor.pin_memory = lambda x, *unused: mode.pin(x)
    tensor.is_pinned = lambda x, *unused: mode.is_pinned(x)
    tensor.record_stream = lambda x, stream: mode.recorded(x, stream)
    tensor.cuda = lambda x, *unused, **also: x.to(torch.device("cuda", mode.device.index))
    make = torch.tensor
    # Of scalars on the device torch reads one after the other, where no mode sees it.
    named: Any = torch
    named.tensor = lambda data, **options: make(
        tree_map_only(Tensor, Tensor.item, data) if isinstance(data, list) else data, **options
    )
    _replace_triton(mode)
    _keep_parameters()


def _keep_parameters() -> None:
    """Module.to leaves parameters as they are where nothing changes; torch exchanges fake ones, and those that are referred to it refuses."""
    module: Any = torch.nn.Module
    apply = module._apply

    def kept(self: Any, change: Any, recurse: bool = True) -> Any:
        with torch.no_grad():
            held = [x for x in (*self._parameters.values(), *self._buffers.values()) if x is not None]
            if any(change(x) is not x for x in held):
                return apply(self, change, recurse)
        for child in self.children() if recurse else ():
            kept(child, change)
        return self

    module._apply = kept


def _never(*unused: Any) -> Any:
    raise RuntimeError("nothing is computed on this device")


def _replace_triton(mode: Symbolic) -> None:
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        for x in tensors.values():
            if not x.is_cuda:
                raise RuntimeError(f"{kernel.fn.__name__}: a tensor on {x.device} is an argument")
        mode.watch.launched(f"triton {kernel.fn.__name__}")
        written = [x for name, x in tensors.items() if name in stored(kernel)]
        mode.use(kernel.fn.__name__, tensors.values(), written)
        for x in written:
            mode.numbers.forget(x.untyped_storage()._cdata)

    replaced: Any = JITFunction
    replaced.run = run


def documents(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of the documents of a micro-batch, from 16 tokens to a quarter of it; as many are short as long."""
    generator, lengths, left = random.Random(seed), [], tokens
    while left:
        length = min(left, max(1, int(16 * (tokens / 64) ** generator.random())))
        lengths.append(length)
        left -= length
    return tuple(lengths)


def run(mode: Symbolic, settings: Any, rank: int, world_size: int, micro_batches: int, steps: int, one: bool) -> int:
    """Some steps of a configuration; the watch has the last one's parts and its peak.

    Returns:
        The bytes that the rank held before the last step.
    """
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    node, local = divmod(rank, RANKS_OF_NODE)
    launch = Launch(rank, world_size, local, min(RANKS_OF_NODE, world_size), node, is_torchrun=True)

    def other(peer: int, own: Tensor) -> Tensor:
        """What ranks tell each other when groups are made: first their nodes, then who they are."""
        return torch.full_like(own, peer // RANKS_OF_NODE if own.item() == node else peer)

    with one_of(mode, rank, world_size) as groups, contextlib.ExitStack() as stack:
        with groups.peers(other):
            found = stack.enter_context(process_groups(settings.parallel, launch))
        return _steps(mode, settings, found, micro_batches, steps, one)


def _steps(mode: Symbolic, settings: Any, groups: Any, micro_batches: int, steps: int, one: bool) -> int:
    from lsys.train.engine import Engine

    watch, held = mode.watch, 0
    with watch.part("construction"):
        engine = Engine(settings, groups)
    for chunk in engine.chunks:
        follow(chunk.module, watch)
    for step in range(steps):
        watch.parts.clear()
        held = watch.peak = watch.held
        with watch.part("plan"):
            tokens = settings.train.micro_batch_tokens
            seeds = range(micro_batches * step, micro_batches * (step + 1))
            batches = [_batch(settings, groups, (tokens,) if one else documents(tokens, seed)) for seed in seeds]
        with watch.part("passes"):
            engine.forward_backward(batches)
        with watch.part("update"):
            engine.step()
        del batches
    return held


def _batch(settings: Any, groups: Any, lengths: tuple[int, ...]) -> Any:
    from lsys.data.plan import MicroBatch
    from lsys.parallel.layout import SequenceLayout

    tokens, parallel = settings.train.micro_batch_tokens, settings.parallel
    layout = getattr(SequenceLayout, parallel.layout)(lengths, parallel.context)
    ids = torch.zeros(tokens, dtype=torch.int64)
    share = -(-tokens // parallel.context)
    slots = -(-share // parallel.tensor) * parallel.tensor
    batch = MicroBatch(layout, ids, ids, torch.ones(tokens), slots)
    return batch.on_rank(groups.context_rank, groups.device, groups.context)
