"""States passed along chains: LASP-1 (Sun et al., 2024) and ZeCO (Chou et al., 2025), one scan with two settings.

The rank of a document's run p receives the state before it, applies S -> A S + B and sends the result to the rank of run
p + 1: transitions never travel, and every rank receives one state for each of its runs, S bytes, whatever the number of
ranks. Backward, gradients of states go the same way in reverse.

    lasp1   whole states: the runs of a document take their turns.
    zeco    states cut in blocks along the value columns, which transitions do not mix: block j of run p goes at step p + j, so
            that a rank works on block 0 while the one before it makes block 1.

Steps are numbered alike on all ranks. Each rank goes through those in which it sends or receives in ascending order, one
message to a peer and step, with all documents' states in it. A message of step s needs what arrived before step s only,
so the ranks at the lowest step that is not done can always do it: no layout makes them wait for each other in a circle,
however often it comes back to a rank.

These are not schedules of `lsys.parallel.schedule`: those carry rows of tokens that their owners made and others pass
on as they are, while a state is another one after each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention.transition import act, gradient, operator, transposed
from lsys.parallel.comm import Pending, SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear.exchange import Exchanged, Inputs
from lsys.parallel.linear.state_exchange_plan import ExternalSegments, Runs, all_runs
from lsys.parallel.messages import chain as messages
from lsys.parallel.messages.chain import columns


class Piece(NamedTuple):
    """One block of the states of some of this rank's runs: which of R, a slice where they are adjacent; how many."""

    rows: Tensor | slice
    number: int
    block: int


class Step(NamedTuple):
    """What one rank sends to and receives from each peer: pieces in the order in which a message has them."""

    send: dict[int, tuple[Piece, ...]]
    receive: dict[int, tuple[Piece, ...]]


class Hops(NamedTuple):
    """Ways from a run to the next one of its chain, as columns: int64 [hops], the same order on all ranks.

    Attributes:
        source, destination: numbers of runs.
        step: of a state's first block; block j goes j steps later.
    """

    source: Tensor
    destination: Tensor
    step: Tensor


def hops(runs: Runs, reverse: bool) -> Hops:
    """All hops, or those of the gradients."""
    source = (runs.place < runs.places - 1).nonzero().flatten()
    if reverse:
        return Hops(source + 1, source, (runs.places - 1 - runs.place)[source + 1])
    return Hops(source, source + 1, runs.place[source])


def block_count(layout: SequenceLayout, causal: bool, state: int, width: int) -> int:
    """The blocks of ZeCO's states of so many bytes and value columns."""
    longest = layout.derived(("longest chain", causal), None, lambda: _longest(all_runs(layout, causal)))
    return messages.block_count(longest, state, width)


def _longest(runs: Runs) -> int:
    return int(runs.places.max()) if len(runs.places) else 0


def chain_steps(layout: SequenceLayout, external: ExternalSegments, blocks: int, reverse: bool) -> tuple[Step, ...]:
    """The steps in which the rank of these segments sends or receives, ascending; `reverse`: gradients. Made once."""
    key = (*external.key, "chain", blocks, reverse)
    return layout.derived(key, None, lambda: _steps(layout, external, blocks, reverse))


def _steps(layout: SequenceLayout, external: ExternalSegments, blocks: int, reverse: bool) -> tuple[Step, ...]:
    rank, ranks, numbers = external.rank, layout.ranks, external.numbers
    runs = all_runs(layout, external.causal)
    every = hops(runs, reverse)
    keys, rows = [], []
    for is_receive, mine, theirs in ((0, every.source, every.destination), (1, every.destination, every.source)):
        chosen = runs.rank[mine] == rank
        mine, theirs, first = mine[chosen], theirs[chosen], every.step[chosen]
        block = torch.arange(blocks)
        step, peer = first[:, None] + block, runs.rank[theirs][:, None]
        keys.append((((step * 2 + is_receive) * ranks + peer) * blocks + block).flatten())
        rows.append(torch.searchsorted(numbers, mine)[:, None].expand(-1, blocks).flatten())
    # By step, way, peer and block; hops of one piece stay in their order, which is that of the other end.
    key, order = torch.cat(keys).sort(stable=True)
    row = torch.cat(rows)[order]
    key, counts = torch.unique_consecutive(key, return_counts=True)
    found: dict[int, Step] = {}
    pieces = zip(key.tolist(), row.split(counts.tolist()), strict=True)
    for number, chosen in pieces:
        number, block = divmod(number, blocks)
        number, peer = divmod(number, ranks)
        at, is_receive = divmod(number, 2)
        messages = found.setdefault(at, Step({}, {}))[is_receive]
        messages[peer] = (*messages.get(peer, ()), Piece(_rows(chosen, external.run.device), len(chosen), block))
    return tuple(found.values())


def _rows(rows: Tensor, device: torch.device) -> Tensor | slice:
    first = int(rows[0])
    if bool((rows == torch.arange(first, first + len(rows))).all()):
        return slice(first, first + len(rows))
    return rows.to(device)


def lasp1(comm: SequenceComm, layout: SequenceLayout, external: ExternalSegments, inputs: Inputs) -> Chain | None:
    """The exchange of whole states; None if no document crosses ranks."""
    return Chain(comm, layout, external, 1) if external.crosses else None


def zeco(comm: SequenceComm, layout: SequenceLayout, external: ExternalSegments, inputs: Inputs) -> Chain | None:
    """The exchange of states in blocks; None if no document crosses ranks."""
    if not external.crosses:
        return None
    _, k, v, *_ = inputs
    state = v.shape[1] * k.shape[2] * v.shape[2] * max(4, v.element_size())
    return Chain(comm, layout, external, block_count(layout, external.causal, state, v.shape[2]))


class Chain:
    """The exchange of one call. See `lsys.parallel.linear.exchange.Exchange`.

    Args:
        comm: the ranks.
        layout, external: of the tokens, and this rank's.
        blocks: that states are cut in.
    """

    def __init__(self, comm: SequenceComm, layout: SequenceLayout, external: ExternalSegments, blocks: int) -> None:
        self.comm, self.layout, self.external, self.blocks = comm, layout, external, blocks

    def forward(self, update: Tensor, transition: Tensor | None) -> Callable[[], Exchanged]:
        before = torch.zeros_like(update, memory_format=torch.contiguous_format)
        a = None if transition is None else operator(transition)
        finish = self._pass_on(before, a, update, reverse=False)

        def finished() -> Exchanged:
            finish()
            return before, None, (transition, before)

        return finished

    def backward(
        self, d_state: Tensor, d_final: Tensor | None, *saved: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        transition, before = saved
        d_update = torch.zeros_like(d_state, memory_format=torch.contiguous_format)  # the gradient of the state after
        a = None if transition is None else transposed(operator(transition))
        finish = self._pass_on(d_update, a, d_state, reverse=True)

        def finished() -> tuple[Tensor, Tensor | None]:
            finish()
            if transition is None:
                return d_update, None
            assert before is not None
            return d_update, gradient(transition, d_update, before)

        return finished

    def _pass_on(self, values: Tensor, a: Tensor | None, added: Tensor, reverse: bool) -> Callable[[], None]:
        """Fill in `values` [R, H, K, V] what arrives, and send A values + added; the function returned ends it.

        On return all is under way that needs nothing of others, and what this rank receives first.
        """
        cut = columns(values.shape[-1], self.blocks)
        steps = iter(chain_steps(self.layout, self.external, self.blocks, reverse))
        sent: list[Pending] = []

        def message(pieces: Sequence[Piece]) -> Tensor:
            parts = []
            for rows, _, block in pieces:
                state = values[rows][..., cut[block]]
                state = state if a is None else act(a[rows], state)
                parts.append((state + added[rows][..., cut[block]]).flatten())
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        def size(piece: Piece) -> int:
            return piece.number * values.shape[1] * values.shape[2] * (cut[piece.block].stop - cut[piece.block].start)

        def post() -> tuple[Step, Pending] | None:
            """Starts steps up to the first in which something arrives."""
            for step in steps:
                buffers = {peer: values.new_empty(sum(map(size, pieces))) for peer, pieces in step.receive.items()}
                pending = self.comm.exchange({peer: message(pieces) for peer, pieces in step.send.items()}, buffers)
                if buffers:
                    return step, pending
                sent.append(pending)
            return None

        arriving = post()

        def finish() -> None:
            nonlocal arriving
            while arriving is not None:
                step, pending = arriving
                buffers = pending.wait()
                for peer, pieces in step.receive.items():
                    for piece, part in zip(pieces, buffers[peer].split([*map(size, pieces)]), strict=True):
                        target = values[:, :, :, cut[piece.block]]
                        target[piece.rows] = part.view(piece.number, *target.shape[1:])
                arriving = post()
            for pending in sent:
                pending.wait()

        return finish
