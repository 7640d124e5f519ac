"""Whole sequences at once, for states that are known: block after block of tokens, whose intermediate results stay in cache.

Backward recomputes a block at a time from the state before it. So what is kept is the inputs and a state a block, and time a
token does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.checks import without_autocast
from lsys.kernels.linear_attention.chunked.blocks import NAMES, Block, Gradients, in_blocks
from lsys.kernels.linear_attention.chunked.chunks import Chunks, Tokens
from lsys.kernels.linear_attention.scan import adjoint, compose


def outputs(
    variant: type[Chunks],
    parts: Sequence[Block],
    tokens: Tokens,
    scale: float,
    o: Tensor,
    initial: Tensor | None = None,
    after: Tensor | None = None,
) -> list[Tensor | None]:
    """Fill in the blocks' tokens of o [T, H, V], and `after`; for `gradients`, the state that each block resumes.

    `initial` and `after` [N, H, K, V] are the states before and after the blocks' segments.
    """
    end: Tensor | None = None
    carried = []
    for block in parts:
        carried.append(end[-1:] if block.resumes and end is not None else None)
        chunks, grid = variant(block.of(tokens), block.grid, scale), block.grid
        before: Tensor | None = None
        if grid.plan.counts:
            state = grid.among_scanned(block.states_before(carried[-1], initial))
            before, _, end, _ = compose(*chunks.maps(), grid.plan, state, cumulative=False)
            end = grid.of_external(end)
        block.write(o, grid.join(chunks.output(before)))
        if after is not None and end is not None:  # of a segment that goes on, the next block writes again
            after.index_copy_(0, block.segments, end)
    return carried


def gradients(
    variant: type[Chunks],
    parts: Sequence[Block],
    carried: Sequence[Tensor | None],
    scale: float,
    found: Gradients,
    do: Tensor,
    initial: Tensor | None = None,
    d_initial: Tensor | None = None,
    d_after: Tensor | None = None,
) -> None:
    """Fill in the blocks' tokens of `found`, and `d_initial`, from the gradients of what `outputs` gives."""
    running: Tensor | None = None
    for block, resumed in zip(reversed(parts), reversed(carried), strict=True):
        leaves, grid = found.leaves(block), block.grid
        chunks, d_chunks = variant(leaves, grid, scale), grid.cut(do[block.tokens], found.dtype)
        with torch.enable_grad():
            chunks.record()
        before = d_update = None
        if grid.plan.counts:
            update, transition = chunks.maps()
            state = grid.among_scanned(block.states_before(resumed, initial))
            before = compose(update, transition, grid.plan, state, cumulative=False).before
            d_end = grid.among_scanned(block.state_gradients(before, running, d_after))
            d_update, d_start = adjoint(chunks.before_gradients(d_chunks), d_end, transition, grid.plan)
            running = block.begun(grid.of_external(d_start), d_initial)
        factors, d_written = chunks.read_gradients(d_chunks, before)
        factors += chunks.map_gradients(d_update, before, d_written)
        found.take(block, leaves, factors)


class _Sweep(torch.autograd.Function):
    """See `sweep`. Inputs are q, k, v, log-decay, beta and the initial states, of which the last three may be None."""

    @staticmethod
    def forward(
        ctx: Any, variant: type[Chunks], parts: tuple[Block, ...], scale: float, final: int | None, *inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        tokens, initial = Tokens(*inputs[:5]), inputs[5]
        k, v = tokens.k, tokens.v
        dtype = torch.promote_types(v.dtype, torch.float32)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        after = None if final is None else v.new_zeros(final, v.shape[1], k.shape[2], v.shape[2], dtype=dtype)
        carried = outputs(variant, parts, tokens, scale, o, None if initial is None else initial.to(dtype), after)
        ctx.variant, ctx.parts, ctx.scale = variant, parts, scale
        ctx.save_for_backward(*inputs, *carried)
        return o, after

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, do: Tensor, d_after: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives each tensor out once
        *tokens, initial = saved[:6]
        found = Gradients(Tokens(*tokens), ctx.needs_input_grad[4:9])
        d_initial = torch.zeros_like(initial) if ctx.needs_input_grad[9] else None
        initial = None if initial is None else initial.to(found.dtype)
        gradients(ctx.variant, ctx.parts, saved[6:], ctx.scale, found, do, initial, d_initial, d_after)
        return None, None, None, None, *found.of(NAMES), d_initial


def sweep(
    variant: type[Chunks],
    tokens: Tokens,
    lengths: Sequence[int],
    scale: float,
    initial: Tensor | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output [T, H, V] of packed sequences and, if `final`, the states [N, H, K, V] after them.

    `initial` [N, H, K, V] are the states before the sequences.
    """
    parts = in_blocks(variant, tokens, lengths, None, final or initial is not None)
    return _Sweep.apply(variant, parts, scale, len(lengths) if final else None, *tokens, initial)
