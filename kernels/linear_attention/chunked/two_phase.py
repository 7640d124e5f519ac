"""Segments with external state in two phases, block after block: their maps first, and the output once the states before them are known.

Three nodes of autograd; what they tell each other beside its gradients, and when, has `handover.py`. Forward, each product is made once:

    Maps     the map of each chunk, which is kept for `Apply`, and those of whole segments
    Intra    what tokens get from their own chunk, and what reads states; all of segments without external state
    Apply    states from chunk to chunk, and what tokens get from them

Backward, in reverse order, by blocks that are recomputed from the inputs and the states before chunks:

    Apply    the gradients of these states by what chunks read, and of those before segments
    Intra    the gradients of all that reads, and all of segments without external state: most of the work, while states travel
    Maps     from the gradients of the states after segments those of all that writes; the sums of both

With D the gradient of the state after a chunk, that of its transition is D S^T. S is known once `Apply` has run, so what
`Maps` is told of the transitions of segments, which says the same, is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.checks import without_autocast
from lsys.kernels.linear_attention.chunked import one_pass
from lsys.kernels.linear_attention.chunked.blocks import Block, Gradients
from lsys.kernels.linear_attention.chunked.chunks import Chunks, Tokens, Written, matmul
from lsys.kernels.linear_attention.chunked.grid import chunk_grid
from lsys.kernels.linear_attention.chunked.handover import Handover, Map
from lsys.kernels.linear_attention.scan import adjoint, compose, last, scan
from lsys.kernels.linear_attention.transition import identity


class Work:
    """What the nodes share: blocks with external state and others, and what they hand each other.

    Args:
        external: blocks of the segments with external state, in order.
        apart: blocks of all others.
        wanted: of which of `Tokens` there are gradients.
    """

    def __init__(
        self,
        variant: type[Chunks],
        external: Sequence[Block],
        apart: Sequence[Block],
        scale: float,
        wanted: Sequence[bool],
    ) -> None:
        self.variant, self.external, self.apart, self.scale, self.wanted = variant, external, apart, scale, wanted
        self.handover = Handover()

    def chunks(self, block: Block, tokens: Tokens, written: Written | None = None) -> Chunks:
        return self.variant(tokens, block.grid, self.scale, written)


class Maps(torch.autograd.Function):
    """The states after the segments with external state from zero [L, H, K, V], their transitions [L, H ...], and a ticket for `Intra`."""

    @staticmethod
    def forward(ctx: Any, work: Work, lengths: Sequence[int], *inputs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens = Tokens(*inputs)
        k, v = tokens.k, tokens.v
        ctx.set_materialize_grads(False)
        ctx.work, ctx.lengths = work, lengths
        ctx.save_for_backward(*inputs)
        dtype = torch.promote_types(v.dtype, torch.float32)
        state, total = v.new_zeros(len(lengths), v.shape[1], k.shape[2], v.shape[2], dtype=dtype), None
        end = cumulative = None
        maps: list[Map] = []
        written: list[Written | None] = []
        for block in work.external:
            chunks, plan = work.chunks(block, block.of(tokens)), block.grid.plan
            update, transition = chunks.maps()
            maps.append((update, transition))
            written.append(chunks.costly())
            start, cumulative = (
                _start(block, update, end),
                None if transition is None else _identity(block, transition, cumulative),
            )
            end, cumulative = last(update, transition, plan, start, cumulative)
            state.index_copy_(0, block.segments, end)  # of a segment that goes on, the next block writes again
            if cumulative is not None:
                total = cumulative.new_zeros(len(lengths), *cumulative.shape[1:]) if total is None else total
                total.index_copy_(0, block.segments, cumulative)
        work.handover.mapped(maps, written)
        return state, total, state.new_empty(0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(
        ctx: Any, d_state: Tensor | None, d_total: Tensor | None, d_ticket: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        tokens, work = Tokens(*ctx.saved_tensors), ctx.work
        if d_ticket is None:  # the output has no gradient, and the other nodes did not run
            work.handover.alone()
            return None, None, None, *_maps_alone(work, ctx.lengths, tokens, d_state, d_total)
        (back, found), running = work.handover.writing(), None
        for i in reversed(range(len(work.external))):
            block, before, transition = work.external[i], back.before[i], back.transition[i]
            d_end = block.state_gradients(before, running, d_state)
            d_update, d_start = adjoint(back.d_before[i], d_end, transition, block.grid.plan)
            running = block.begun(d_start, None)
            leaves = found.leaves(block)
            chunks = work.chunks(block, leaves)
            with torch.enable_grad():
                _ = chunks.k_to_end, chunks.total, chunks.written
            factors = chunks.map_gradients(d_update, before, back.d_written[i])
            found.take(block, leaves, factors, first="vb", more="kg")
        return None, None, None, *found.of("kvgb")


class Intra(torch.autograd.Function):
    """[T, H, V]: of segments with external state what tokens get from their own chunk, of others all; in the states' dtype.

    Of `inputs` q alone has its gradient from here; the others' are left to `Maps`.
    """

    @staticmethod
    def forward(ctx: Any, work: Work, ticket: Tensor, *inputs: Any) -> Tensor:
        tokens, queries = Tokens(*inputs), list[Tensor]()
        o = torch.empty_like(
            tokens.v, dtype=torch.promote_types(tokens.v.dtype, torch.float32), memory_format=torch.contiguous_format
        )
        for block, written in zip(work.external, work.handover.to_read(), strict=True):
            chunks = work.chunks(block, block.of(tokens), written)
            block.write(o, block.grid.join(chunks.intra()))
            queries.append(chunks.queries())
        work.handover.read(queries)
        carried = one_pass.outputs(work.variant, work.apart, tokens, work.scale, o)
        ctx.set_materialize_grads(False)
        ctx.work = work
        ctx.save_for_backward(*inputs, *carried)
        return o

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, work = ctx.saved_tensors, ctx.work
        if do is None:  # of states alone, on their way to `Maps` by nodes that `intra` is passed through
            return None, None, None, None, None, None, None
        back, d_written = work.handover.reading(), list[Written]()
        found = Gradients(Tokens(*saved[:5]), work.wanted)
        for block, before, written in zip(work.external, back.before, back.written, strict=True):
            leaves = found.leaves(block)
            chunks = work.chunks(block, leaves, written)
            with torch.enable_grad():
                _ = chunks.scores, chunks.q_from_start
            factors, d_block = chunks.read_gradients(block.grid.cut(do[block.tokens], found.dtype), before)
            d_written.append(d_block)
            found.take(block, leaves, factors, first="qkg")
        work.handover.have_read(found, d_written, last=not ctx.needs_input_grad[1])
        one_pass.gradients(work.variant, work.apart, saved[5:], work.scale, found, do)
        return None, do.new_empty(0), *found.of("q"), None, None, None, None


class Apply(torch.autograd.Function):
    """The output [T, H, V], in place of `intra`, given the states before the segments with external state [L, H, K, V]; None is zero."""

    @staticmethod
    def forward(ctx: Any, work: Work, intra: Tensor, state: Tensor | None, *inputs: Any) -> Tensor:
        maps, every_query = work.handover.to_apply()
        o, end = intra.detach().to(Tokens(*inputs).v.dtype), None
        ctx.state = None if state is None else (state.shape, state.dtype)
        state = None if state is None else state.to(intra.dtype)
        befores = []
        for block, (update, transition), queries in zip(work.external, maps, every_query, strict=True):
            start = block.states_before(end, state)
            before, _, end, _ = compose(update, transition, block.grid.plan, start, cumulative=False)
            befores.append(before)
            read = matmul(queries, before, work.scale)
            block.write(o, intra[block.tokens] + block.grid.join(read))
        ctx.work = work
        ctx.save_for_backward(*inputs, *befores, *(transition for _, transition in maps))
        return o

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        saved, work = ctx.saved_tensors, ctx.work
        tokens, blocks = Tokens(*saved[:5]), len(work.external)
        before, transition = saved[5 : 5 + blocks], saved[5 + blocks :]
        dtype = torch.promote_types(do.dtype, torch.float32)
        d_state = do.new_empty(ctx.state[0], dtype=ctx.state[1]) if ctx.needs_input_grad[2] else None
        running, d_before, written = None, [], []
        for i in reversed(range(blocks)):
            block = work.external[i]
            chunks = work.chunks(block, block.of(tokens))
            d_before.append(chunks.before_gradients(block.grid.cut(do[block.tokens], dtype)))
            written.append(chunks.costly())
            if d_state is not None:
                d_end = block.state_gradients(before[i], running, None)
                running = block.begun(adjoint(d_before[-1], d_end, transition[i], block.grid.plan)[1], d_state)
        if ctx.needs_input_grad[1]:
            work.handover.begin(before, transition, d_before[::-1], written[::-1])
        return None, do.to(dtype), d_state, *[None] * 5


def _start(block: Block, like: Tensor, running: Tensor | None) -> Tensor:
    """The states before the parts of a block, [L, H, K, V], zero before their segments."""
    state = block.states_before(running, None)
    return like.new_zeros(len(block.segments), *like.shape[1:]) if state is None else state


def _identity(block: Block, like: Tensor, running: Tensor | None) -> Tensor:
    """The transitions from the starts of segments to the parts of a block, [L, H ...]."""
    cumulative = identity(like, len(block.segments))
    return torch.cat([running[-1:], cumulative[1:]]) if block.resumes and running is not None else cumulative


def _maps_alone(
    work: Work, lengths: Sequence[int], tokens: Tokens, d_state: Tensor | None, d_total: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of k, v, log-decay and beta by those of the maps, all chunks at once: for losses of states alone."""
    places = torch.arange(len(tokens.v), device=tokens.v.device)
    external = torch.cat([places[block.tokens] for block in work.external])
    kinds = zip(tokens, work.wanted, strict=True)
    leaves = Tokens(*(x if x is None else x.detach().requires_grad_(is_wanted) for x, is_wanted in kinds))  # type: ignore[arg-type]
    with torch.enable_grad():
        grid = chunk_grid(lengths, range(len(lengths)), work.external[0].grid.size, tokens.v.device)
        scanned = scan(*work.variant(leaves.each(lambda x: x[external]), grid, work.scale).maps(), grid.plan)
    pairs = ((scanned.total, d_state), (scanned.total_cumulative, d_total))
    given = [(x, dx) for x, dx in pairs if x is not None and x.requires_grad and dx is not None]
    if not given:
        return None, None, None, None
    outputs, d_outputs = zip(*given, strict=True)
    needed = [x for x in leaves[1:] if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, needed, d_outputs, allow_unused=True))
    return tuple(next(found) if is_wanted else None for is_wanted in work.wanted[1:])
