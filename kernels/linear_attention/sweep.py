"""Whole sequences at once, for states that are known: block after block of tokens, whose intermediate results stay in cache.

Backward recomputes a block at a time from the state before it. So what is kept is the inputs and a state a block, and time a
token does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.chunks import Chunks, Tokens
from lsys.kernels.linear_attention.grid import ChunkGrid, chunk_grid

BLOCK = 2**18  # elements of a block of v; some tens of such tensors are in use at a time


@dataclass(frozen=True)
class Block:
    """Some chunks in a row, which are parts of sequences.

    Attributes:
        tokens: of all tokens those of the block.
        grid: of its parts; linked are those that a state enters or leaves.
        sequences: of each linked part its sequence, int64 [L].
        resumes: whether the first part goes on with a sequence of the block before; then it is linked.
        goes_on: whether the last part goes on in the next block; then it is linked.
    """

    tokens: slice
    grid: ChunkGrid
    sequences: Tensor
    resumes: bool
    goes_on: bool


class _Part(NamedTuple):
    sequence: int
    tokens: int
    resumes: bool
    goes_on: bool


@lru_cache(maxsize=64)  # the layers of a step ask for the same few
@torch.inference_mode(False)  # what is kept serves later calls that record gradients
def block_plan(lengths: tuple[int, ...], linked: bool, size: int, room: int, device: torch.device) -> tuple[Block, ...]:
    """Blocks of at most `room` chunks of `size` tokens, of sequences that are all linked or none."""
    parts: list[list[_Part]] = [[]]
    left = room
    for sequence, length in enumerate(lengths):
        start = 0
        while start < length or (linked and start == length == 0):
            tokens = min(length - start, left * size)
            parts[-1].append(_Part(sequence, tokens, start > 0, start + tokens < length))
            start, left = start + tokens, left - -(-tokens // size)
            if left == 0:
                parts.append([])
                left = room
            if length == 0:
                break
    blocks: list[Block] = []
    for held in parts:
        if held:
            blocks.append(_block(held, blocks[-1].tokens.stop if blocks else 0, linked, size, device))
    return tuple(blocks)


def _block(parts: list[_Part], start: int, linked: bool, size: int, device: torch.device) -> Block:
    lengths = tuple(part.tokens for part in parts)
    tied = tuple(i for i, part in enumerate(parts) if linked or part.resumes or part.goes_on)
    sequences = torch.tensor([parts[i].sequence for i in tied], dtype=torch.int64, device=device)
    tokens = slice(start, start + sum(lengths))
    return Block(tokens, _grid(lengths, tied, size, device), sequences, parts[0].resumes, parts[-1].goes_on)


@lru_cache(maxsize=256)  # long sequences are made of equal blocks
def _grid(lengths: tuple[int, ...], linked: tuple[int, ...], size: int, device: torch.device) -> ChunkGrid:
    return chunk_grid(lengths, linked, size, device)


class _Sweep(torch.autograd.Function):
    """See `sweep`. Inputs are q, k, v, log-decay, beta and the initial states, of which the last three may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        member: type[Chunks],
        blocks: tuple[Block, ...],
        scale: float,
        final: int | None,
        *inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tokens, initial = Tokens(*inputs[:5]), inputs[5]
        k, v = tokens.k, tokens.v
        dtype = torch.promote_types(v.dtype, torch.float32)
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        after = None if final is None else v.new_zeros(final, v.shape[1], k.shape[2], v.shape[2], dtype=dtype)
        end: Tensor | None = None
        carried = []
        for block in blocks:
            carried.append(end[-1:] if block.resumes and end is not None else None)
            state = _entering(block, carried[-1], initial, dtype)
            o[block.tokens], end = member(_of(tokens, block), block.grid, scale).run(state)
            if after is not None and end is not None:  # of a sequence that goes on, the next block writes again
                after.index_copy_(0, block.sequences, end)
        ctx.member, ctx.blocks, ctx.scale = member, blocks, scale
        ctx.save_for_backward(*inputs, *carried)
        return o, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, d_after: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives each tensor out once
        inputs, carried = saved[:6], saved[6:]
        tokens, initial, dtype = Tokens(*inputs[:5]), inputs[5], torch.promote_types(do.dtype, torch.float32)
        grads = [_room(x) if wanted else None for x, wanted in zip(inputs, ctx.needs_input_grad[4:], strict=True)]
        d_running: Tensor | None = None
        for block, running in zip(reversed(ctx.blocks), reversed(carried), strict=True):
            part = Tokens(*(x if x is None else x.detach() for x in _of(tokens, block)))  # type: ignore[arg-type]
            state = _entering(block, running, initial, dtype)
            needed = [x for x, grad in zip((*part, state), grads, strict=True) if x is not None and grad is not None]
            if state is not None and grads[5] is None:
                needed.append(state)  # for the block before
            with torch.enable_grad():
                for x in needed:
                    x.requires_grad_()
                o, end = ctx.member(part, block.grid, ctx.scale).run(state)
            ends = [] if end is None else [(end, _leaving(block, end, d_running, d_after))]
            outputs, d_outputs = zip((o, do[block.tokens]), *ends, strict=True)
            found = iter(torch.autograd.grad(outputs, needed, d_outputs, materialize_grads=True))
            for grad in grads[:5]:
                if grad is not None and grad.dim() == 1:  # of a decay per head, which all blocks share
                    grad += next(found)
                elif grad is not None:
                    grad[block.tokens] = next(found)
            d_state = next(found, None)
            d_running = d_state[:1] if block.resumes and d_state is not None else None
            if grads[5] is not None and d_state is not None:
                fresh = slice(int(block.resumes), None)
                grads[5].index_copy_(0, block.sequences[fresh], d_state[fresh].to(grads[5].dtype))
        return None, None, None, None, *grads


def _of(tokens: Tokens, block: Block) -> Tokens:
    return tokens.each(lambda x: x[block.tokens])


def _room(x: Tensor) -> Tensor:
    """For the gradient; that of a decay per head is a sum over blocks."""
    return torch.zeros_like(x) if x.dim() == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _entering(block: Block, running: Tensor | None, initial: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The states before the linked parts of a block, [L, H, K, V]; None is zero."""
    if initial is not None:
        state = initial.index_select(0, block.sequences).to(dtype)
        if running is not None:
            state[:1] = running
        return state
    if running is None:
        return None
    links = len(block.sequences)
    return running.clone() if links == 1 else torch.cat([running, running.new_zeros(links - 1, *running.shape[1:])])


def _leaving(block: Block, end: Tensor, d_running: Tensor | None, d_after: Tensor | None) -> Tensor:
    """The gradient of the states after the linked parts of a block."""
    d_end = torch.zeros_like(end) if d_after is None else d_after.index_select(0, block.sequences)
    if block.goes_on and d_running is not None:  # what is given for the sequence counts at its end only
        d_end[-1:] = d_running
    return d_end


def sweep(
    member: type[Chunks],
    tokens: Tokens,
    lengths: Sequence[int],
    scale: float,
    initial: Tensor | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output [T, H, V] of packed sequences and, if `final`, the states [N, H, K, V] after them.

    `initial` [N, H, K, V] are the states before the sequences.
    """
    k, v = tokens.k, tokens.v
    size = member.chunk_size(lengths, k.shape[-1], v.shape[-1])
    chunks = max(1, BLOCK // (size * max(1, v.shape[1] * max(k.shape[-1], v.shape[-1]))))
    blocks = block_plan(tuple(lengths), final or initial is not None, size, chunks, v.device)
    rows = len(lengths) if final else None
    return _Sweep.apply(member, blocks, scale, rows, *tokens, initial)
