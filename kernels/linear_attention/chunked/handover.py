"""What the three nodes of two phases hand each other beside autograd's gradients. See `Handover`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NoReturn

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked.blocks import Gradients
from lsys.kernels.linear_attention.chunked.chunks import Written

Map = tuple[Tensor, Tensor | None]


class Stage(Enum):
    """The last step of the forward pass that has ended."""

    NEW = "nothing"
    MAPPED = "`segment_map`"
    READ = "`intra`"
    APPLIED = "`apply`"


@dataclass
class Pass:
    """One backward pass between the nodes; all but `found` by block of the segments with external state.

    Attributes:
        task: the graph task of autograd (one call of `backward` or `grad`) that it is part of.
        before: the states before chunks.
        transition: of each chunk.
        d_before: the gradients of `before` by what chunks read.
        written: what `Chunks.costly` gave, for `Intra` not to make it again.
        d_written: the gradients of what chunks write; from `Intra` on.
        found: the gradients of all tokens so far; from `Intra` on.
    """

    task: int
    before: Sequence[Tensor]
    transition: Sequence[Tensor | None]
    d_before: list[Tensor]
    written: list[Written | None]
    d_written: list[Written] = field(default_factory=list)
    found: Gradients | None = None


class Handover:
    """What `Maps`, `Intra` and `Apply` of one call leave for each other, and the order in which they do.

    Forward, once each; an `intra` has one `apply`.

        step             takes                       leaves                        frees               then
        Maps.forward                                 `mapped`: maps, written                           MAPPED
        Intra.forward    `to_read`: written          `read`: queries               written             READ
        Apply.forward    `to_apply`: maps, queries   (states: saved by autograd)   maps, queries       APPLIED

    Backward, as often as autograd keeps the graph, each time in one graph task; APPLIED all along.

        step             takes                       leaves                        frees
        Apply.backward                               `begin`: a `Pass`             what a pass before has left
        Intra.backward   `reading`: the pass         `have_read`: its d_written,   its `written`; all of it if `Maps` has no part
                                                     found
        Maps.backward    `writing`: the pass                                       the pass

    Autograd leaves out steps whose gradients nobody asks for: that of states before segments needs `Apply` alone, that of queries
    ends with `Intra`. What such a pass leaves goes with the next or with the graph, and no other graph task takes it; where tensors
    are not trained at all, so that a step is never made, nothing is left. With gradients of maps alone, neither `Apply` nor `Intra`
    has one (`Intra` may run, given None), and `Maps` goes its own way (`alone`). Without gradients there are no backward steps.

    All else is refused by a RuntimeError: a forward step out of turn or a second time, a gradient for `Intra` that does not come
    by way of `Apply` in the same graph task, one for `Maps`' ticket without `Intra`. That the graph was freed is said by autograd,
    before anything here is touched.
    """

    def __init__(self) -> None:
        self.stage = Stage.NEW
        self.maps: list[Map] = []
        self.written: list[Written | None] = []
        self.queries: list[Tensor] = []
        self.under_way: Pass | None = None

    def mapped(self, maps: list[Map], written: list[Written | None]) -> None:
        """By block: the maps of chunks, and what they write where it is costly."""
        check_turn(self.stage, "segment_map", Stage.NEW)
        self.maps, self.written, self.stage = maps, written, Stage.MAPPED

    def to_read(self) -> list[Written | None]:
        """By block, what chunks write, until `read`."""
        check_turn(self.stage, "intra", Stage.MAPPED)
        return self.written

    def read(self, queries: list[Tensor]) -> None:
        """By block, what reads the states; what chunks write is not needed any more."""
        check_turn(self.stage, "intra", Stage.MAPPED)
        self.written.clear()
        self.queries, self.stage = queries, Stage.READ

    def to_apply(self) -> tuple[list[Map], list[Tensor]]:
        """The maps of chunks and what reads their states, by block, of which nothing is kept."""
        check_turn(self.stage, "apply", Stage.READ)
        found = self.maps, self.queries
        self.maps, self.queries, self.stage = [], [], Stage.APPLIED
        return found

    def begin(
        self,
        before: Sequence[Tensor],
        transition: Sequence[Tensor | None],
        d_before: list[Tensor],
        written: list[Written | None],
    ) -> None:
        """A backward pass, which `Intra` goes on with, in place of one that an error broke off or that ended early."""
        self.under_way = Pass(graph_task(), before, transition, d_before, written)

    def reading(self) -> Pass:
        """The pass that `Apply` began in this graph task."""
        back = self.under_way
        if self.stage is not Stage.APPLIED:
            refuse(
                "what `intra` gives has a gradient, but `apply` was not called; only the output of `apply` is complete"
            )
        if back is None or back.task != graph_task() or back.found is not None:
            refuse("what `intra` gives has a gradient that is not of the output of `apply`; use that output alone")
        return back

    def have_read(self, found: Gradients, d_written: list[Written], last: bool) -> None:
        """What `Intra` found, for `Maps`; `last` if it has no part in this pass."""
        back = self.reading()
        back.written.clear()
        back.found, back.d_written = found, d_written
        if last:
            self.under_way = None

    def writing(self) -> tuple[Pass, Gradients]:
        """The pass that `Intra` went on with in this graph task, of which nothing is kept; and what it found."""
        back, self.under_way = self.under_way, None
        if back is None or back.task != graph_task() or back.found is None:
            refuse(
                "the ticket of the maps has a gradient, but that of `intra` was not taken; the ticket is for `intra` alone"
            )
        return back, back.found

    def alone(self) -> None:
        """`Maps` has gradients of its maps alone: what a pass before has left is forgotten."""
        self.under_way = None


def check_turn(stage: Stage, call: str, after: Stage) -> None:
    """Refuse `call` unless it goes on from where the forward pass is."""
    if stage is not after:
        refuse(
            f"`{call}` comes after {stage.value}, but it goes on from {after.value}: `segment_map`, `intra` and `apply` "
            "are called once each, in this order; make new `segments` for another call"
        )


def graph_task() -> int:
    """The number of autograd's graph task, a new one for each `backward` or `grad`; -1 outside."""
    return torch._C._current_graph_task_id()


def refuse(what: str) -> NoReturn:
    raise RuntimeError(f"linear attention in two phases: {what}")
