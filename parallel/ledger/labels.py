"""Which axis a process group belongs to, and on which nodes its ranks are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist

from lsys.parallel.traffic import NETWORK, NODE

OTHER = "other"  # the axis of groups without a label
WORLD = "world"  # the axis of the default group, where it is labelled to tell its nodes


class _Label(NamedTuple):
    axis: str
    nodes: tuple[int, ...] | None  # in group order


# Process-wide like the process groups themselves; a label ends with its group, or by `unlabel`.
_labels: weakref.WeakKeyDictionary[dist.ProcessGroup, _Label] = weakref.WeakKeyDictionary()
_listeners: list[Callable[[], None]] = []  # called when labels change


def label(group: dist.ProcessGroup | None, axis: str, node_of_rank: Sequence[int] | None = None) -> None:
    """Account what `group` moves to `axis`; the last call counts.

    Args:
        group: None is the default group.
        axis: of the mesh, such as "tensor", "context", "data" or "pipeline". WORLD says that the group is of no axis:
            its collectives are accounted to WORLD, and what two ranks send each other through it to the axis of the
            smallest labelled group that holds both (of equal ones, the first). A group without a label is treated alike.
        node_of_rank: node of each rank of the group, in group order. None keeps what an earlier label said; where none
            did, labels of other groups may tell where its ranks are, and if not, they share a node.

    Raises:
        ValueError: `node_of_rank` has another size than the group.
    """
    group = dist.group.WORLD if group is None else group
    assert group is not None
    if node_of_rank is not None and len(node_of_rank) != group.size():
        raise ValueError(f"node_of_rank names {len(node_of_rank)} ranks; the {axis} group has {group.size()}")
    nodes = None if node_of_rank is None else tuple(node_of_rank)
    if nodes is None and group in _labels:
        nodes = _labels[group].nodes
    _labels[group] = _Label(axis, nodes)
    for listener in list(_listeners):
        listener()


def unlabel(group: dist.ProcessGroup) -> None:
    """The group is of no axis any more: of a mesh that has ended, though something may refer to its groups still."""
    if _labels.pop(group, None):
        for listener in list(_listeners):
            listener()


@dataclass(frozen=True, eq=False)
class Place:
    """This process in a group.

    Attributes:
        axis: what the group's traffic is accounted to.
        rank: in the group. ranks: global ranks, in group order. nodes: of each of them.
    """

    axis: str
    rank: int
    ranks: tuple[int, ...]
    nodes: tuple[int, ...]

    def link(self, peer: int) -> str:
        """The link class between this rank and the group rank `peer`; an unknown peer may be on any node."""
        if peer < 0:
            return NETWORK if len(set(self.nodes)) > 1 else NODE
        return NODE if self.nodes[peer] == self.nodes[self.rank] else NETWORK


class Places:
    """`places(group, peer)`: the place of this process, found once per group until labels change."""

    def __init__(self) -> None:
        self._found: dict[tuple[dist.ProcessGroup, int | None], Place] = {}

    def __enter__(self) -> Places:
        _listeners.append(self._found.clear)
        return self

    def __exit__(self, *_: object) -> None:
        _listeners.remove(self._found.clear)
        self._found.clear()  # what refers to a group keeps its threads and connections

    def __call__(self, group: dist.ProcessGroup, peer: int | None) -> Place:
        """`peer`: the group rank of the other end of a point-to-point operation, None for a collective."""
        place = self._found.get((group, peer))
        if place is None:
            place = self._found[group, peer] = _place(group, peer)
        return place


def _place(group: dist.ProcessGroup, peer: int | None) -> Place:
    ranks, own = tuple(dist.get_process_group_ranks(group)), _labels.get(group)
    axis = own.axis if own else OTHER
    if axis in (OTHER, WORLD) and peer is not None and peer >= 0:
        axis = _axis_between(ranks[peer], ranks[group.rank()]) or axis
    nodes = own.nodes if own else None
    if nodes is None:
        known = {r: n for _, members, nodes in _labelled() if nodes for r, n in zip(members, nodes, strict=True)}
        here = known.get(ranks[group.rank()], 0)
        nodes = tuple(known.get(rank, here) for rank in ranks)
    return Place(axis, group.rank(), ranks, nodes)


def _labelled() -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...] | None]]:
    """Axis, global ranks and nodes of the labelled groups that exist."""
    for group, (axis, nodes) in list(_labels.items()):
        try:
            yield axis, tuple(dist.get_process_group_ranks(group)), nodes
        except KeyError:  # destroyed, though something refers to it
            pass


def _axis_between(*ends: int) -> str | None:
    """The axis of the smallest group with both ranks that has one.

    Megatron's pipelines of two stages send one way through their own group and the other way through the default one.
    """
    holding = [
        (len(members), axis)
        for axis, members, _ in _labelled()
        if axis not in (OTHER, WORLD) and set(ends) <= set(members)
    ]
    return min(holding, key=lambda found: found[0], default=(0, None))[1]
