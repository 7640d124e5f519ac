"""What the nodes of `intra` and `apply` hand each other beside autograd's gradients. See `Handover`."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from lsys.kernels.linear_attention.chunked.handover import Stage, check_turn, graph_task, refuse

Found = TypeVar("Found")


class Handover(Generic[Found]):
    """What the two nodes of one call leave for each other, and the order in which they do: as in `chunked.handover`, without maps.

    Forward, once each: `intra`, then, where states enter, `apply`, which leaves what is left of these at each span.

    Backward, as often as autograd keeps the graph, each time in one graph task: `apply` begins a pass with the gradients of states that it
    `found`, and `intra` takes these, for the gradients of all tokens are taken once, from the sum of both states. Where no states entered, the
    node of `intra` finds its own. What a pass that ends early has left goes with the next or with the graph, and no other graph task takes it.

    All else is refused by a RuntimeError.

    Attributes:
        start: [ml, H, K, V], at each span of a segment with external state what is left of the state before its segment; None: no state entered.
    """

    def __init__(self) -> None:
        self.stage = Stage.NEW
        self.start: Tensor | None = None
        self.under_way: tuple[int, Found] | None = None

    def read(self) -> None:
        """`intra` is made."""
        check_turn(self.stage, "intra", Stage.NEW)
        self.stage = Stage.READ

    def entered(self, start: Tensor) -> None:
        """`apply` is made, with states that enter."""
        check_turn(self.stage, "apply", Stage.READ)
        self.start, self.stage = start, Stage.APPLIED

    def begin(self, found: Found) -> None:
        """A backward pass, which `intra` goes on with, in place of one that ended early."""
        self.under_way = graph_task(), found

    def reading(self) -> Found | None:
        """What `apply` found in this graph task, of which nothing is kept; None where no states entered."""
        if self.stage is not Stage.APPLIED:
            return None
        under_way, self.under_way = self.under_way, None
        if under_way is None or under_way[0] != graph_task():
            refuse("what `intra` gives has a gradient that is not of the output of `apply`; use that output alone")
        return under_way[1]
