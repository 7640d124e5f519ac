"""The states of Megatron's distributed optimizer as data ranks hold them: parts of whole tensors, without a gather and without a copy.

A data rank updates a run of each parameter's numbers in their order in memory, wherever the border of a bucket falls. Megatron 0.16 stores such
runs gathered to whole tensors (`fully_reshardable`: every rank holds the whole state of its slice, in host memory) or in the order of its buffers
(`dp_reshardable`: no other tensor or pipeline degree can read them); ranges of a flattened tensor (`fully_sharded_model_space`) it refuses.
Here a run is cut into boxes, of which torch's format takes any: the rest of a row, whole rows, the beginning of a row. Their keys and wholes are
those of `fully_reshardable`, so what either has written the other reads.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = "optimizer.state."  # keys of tensors: this, a state's name, a parameter's key
LARGEST = 1 << 24  # numbers of a box: what comes from a device passes the host's memory in pieces of 64 MiB

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, size


@contextlib.contextmanager
def in_shards(optimizer: Any) -> Iterator[None]:
    """Inside, DistributedOptimizer gives each rank's own states for saving, and takes them loaded in place, instead of gathering all of them."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    distributed = [each for each in chained if isinstance(each, DistributedOptimizer)]
    for each in distributed:
        each.sharded_state_dict = functools.partial(_sharded, each)
        each.load_parameter_state_from_fully_reshardable = lambda loaded: None
    try:
        yield
    finally:
        for each in distributed:  # the class's show again
            del each.sharded_state_dict, each.load_parameter_state_from_fully_reshardable


def in_place(state: dict[str, Any]) -> None:
    """Let tensors that are stored as several, as SwiGLU's weights, be the loaded ones: parts are loaded into them, and need not be joined anew."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensorFactory):
            parts = nested_values(entry.build_fn(entry.key, entry.data, entry.replica_id, None))
            if {part.data.untyped_storage().data_ptr() for part in parts} == {entry.data.untyped_storage().data_ptr()}:
                entry.merge_fn = functools.partial(_itself, entry.data)


def _itself(tensor: Tensor, parts: Any) -> Tensor:
    return tensor


def _sharded(
    optimizer: DistributedOptimizer, model: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> dict[str, Any]:
    if is_loading:  # as Megatron's own does: states that are not there yet are made
        optimizer.load_state_dict(optimizer.state_dict())
    states = dict(enumerate(own_states(optimizer, model)))
    return optimizer.state_dict() | {"param_state": states, "param_state_sharding_type": "fully_reshardable"}


def own_states(optimizer: DistributedOptimizer, model: dict[str, Any]) -> Iterator[ShardedTensor]:
    """This rank's part of every state, as views of the optimizer's tensors: `param` (the fp32 parameter) and what its Adam keeps.

    Args:
        model: the sharded state dicts of the model chunks, which say where each parameter lies in the whole.
    """
    entries = [each for each in nested_values(model) if isinstance(each, (ShardedTensor, ShardedTensorFactory))]
    places = {id(entry.data): entry for entry in entries}
    for parameter in optimizer.model_param_gbuf_map:
        mine = optimizer._get_model_param_range_map(parameter)["param"]
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for name, values in states.items():
            if name != "step":  # is stored once for all
                yield from _cut(places[id(parameter)], name, values.detach().view(-1), mine.start)


def _cut(entry: ShardedTensor | ShardedTensorFactory, name: str, values: Tensor, start: int) -> Iterator[ShardedTensor]:
    """The boxes of one state: `values` [n], numbers `start` to `start` + n of the local parameter."""
    parts: Any = [entry]
    if isinstance(entry, ShardedTensorFactory):  # a parameter that is stored as several, as SwiGLU's
        parts = nested_values(entry.build_fn(entry.key, entry.data, entry.replica_id, None))
    for part in parts:
        axes = part.prepend_axis_num
        for offset, size, first in _blocks(part.data):
            first -= entry.data.storage_offset() + start  # among the values
            low, high = max(first, 0), min(first + math.prod(size), len(values))
            for inner, shape in boxes(size, low - first, high - first):
                whole = (0,) * axes + tuple(a + b for a, b in zip(offset, inner, strict=True))
                yield ShardedTensor(
                    key=f"{STATES}{name}.{part.key}",
                    data=values[low : low + math.prod(shape)].view((1,) * axes + shape),
                    dtype=values.dtype,
                    local_shape=(1,) * axes + shape,
                    global_shape=part.global_shape,
                    global_offset=tuple(a + b for a, b in zip(part.global_offset, whole, strict=True)),
                    axis_fragmentations=None,
                    replica_id=(*part.replica_id[:2], 0),  # of the data ranks each is the only one that has it
                )
                low += math.prod(shape)


def _blocks(view: Tensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """(offset, size, place in the storage) of the largest parts of a view that are contiguous."""
    if view.is_contiguous():
        yield (0,) * view.dim(), tuple(view.shape), int(view.storage_offset())
        return
    for row, inside in enumerate(view):
        for offset, size, first in _blocks(inside):
            yield (row, *offset), (1, *size), first


def boxes(shape: tuple[int, ...], start: int, stop: int, largest: int = LARGEST) -> Iterator[Box]:
    """The boxes of a contiguous tensor that together hold its numbers `start` to `stop`, in that order; each is contiguous in it.

    Args:
        largest: whole rows come in boxes of at most so many numbers, but at least one row.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:
        yield from _in_row(shape, last, start, stop, largest)
        return
    yield from _in_row(shape, first - 1, start, first * row, largest)
    step = max(1, largest // row)
    for begin in range(first, last, step):
        yield (begin, *(0 for _ in shape[1:])), (min(step, last - begin), *shape[1:])
    yield from _in_row(shape, last, last * row, stop, largest)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int, largest: int) -> Iterator[Box]:
    base = row * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - base, stop - base, largest):
        yield (row, *offset), (1, *size)
