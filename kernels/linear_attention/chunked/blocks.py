"""Segments in blocks of a few chunks, whose intermediate results stay in cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked.chunks import Chunks, Pairs, Tokens
from lsys.kernels.linear_attention.chunked.grid import ChunkGrid, chunk_grid

# Elements of a block of v; some tens of such tensors are in use at a time. On GPUs every operation is a launch, so blocks are larger
# than a cache: a layer of 32 heads of 128 and 8K tokens has 5,600 launches for 83,000.
BLOCK, GPU_BLOCK = 2**18, 2**23
NAMES = "qkvgb"  # of `Tokens`, in that order


@dataclass(frozen=True)
class Block:
    """Some chunks in a row, which are parts of segments.

    Attributes:
        tokens: of all tokens those of the block; int64 if they do not lie in a row.
        grid: of its parts; its `external` ones are those that a state enters or leaves.
        segments: of each part with external state its segment's number among the chosen ones, int64 [L].
        resumes: whether the first part goes on with a segment of the block before; then its state is external.
        goes_on: whether the last part goes on in the next block; then its state is external.
    """

    tokens: slice | Tensor
    grid: ChunkGrid
    segments: Tensor
    resumes: bool
    goes_on: bool

    def of(self, tokens: Tokens) -> Tokens:
        return tokens.each(lambda x: x[self.tokens])

    def write(self, x: Tensor, part: Tensor) -> None:
        """To the block's tokens of x."""
        x[self.tokens] = part.to(x.dtype)

    def states_before(self, end: Tensor | None, given: Tensor | None) -> Tensor | None:
        """The states before the parts with external state [L, H, K, V]: of the first that after the block before, else those given.

        end: after the parts with external state of the block before. given: of all chosen segments. None is zero.
        """
        running = end[-1:] if self.resumes and end is not None else None
        if given is not None:
            state = given.index_select(0, self.segments)
        elif running is not None:
            state = running.new_zeros(len(self.segments), *running.shape[1:])
        else:
            return None
        if running is not None:
            state[:1] = running
        return state

    def state_gradients(self, like: Tensor, running: Tensor | None, given: Tensor | None) -> Tensor:
        """The gradients of the states after the parts with external state: `running` of the next block, else those given; None is zero."""
        if given is None:
            d_end = like.new_zeros(len(self.segments), *like.shape[1:])
        else:
            d_end = given.index_select(0, self.segments)
        if self.goes_on and running is not None:  # what is given for the segment counts at its end only
            d_end[-1:] = running
        return d_end

    def begun(self, d_start: Tensor, found: Tensor | None) -> Tensor | None:
        """`running` for the block before, of the gradients of the states before the parts with external state; the others go to `found`."""
        if found is not None:
            fresh = slice(int(self.resumes), None)
            found.index_copy_(0, self.segments[fresh], d_start[fresh].to(found.dtype))
        return d_start[:1] if self.resumes else None


class _Part(NamedTuple):
    segment: int
    start: int
    tokens: int
    resumes: bool
    goes_on: bool


def in_blocks(
    variant: type[Chunks], tokens: Tokens, lengths: Sequence[int], chosen: Sequence[int] | None, external: bool
) -> tuple[Block, ...]:
    """The blocks of the chosen segments (None: all) of `lengths` tokens, all with external state or none."""
    k, v = tokens.k, tokens.v
    mine = lengths if chosen is None else [lengths[i] for i in chosen]
    size = variant.chunk_size(mine, k.shape[-1], v.shape[-1])
    block = BLOCK if v.device.type == "cpu" else GPU_BLOCK
    room = max(1, block // (size * max(1, v.shape[1] * max(k.shape[-1], v.shape[-1]))))
    return _blocks(tuple(lengths), None if chosen is None else tuple(chosen), external, size, room, v.device)


@lru_cache(maxsize=64)  # the layers of a step ask for the same few
@torch.inference_mode(False)  # what is kept serves later calls that record gradients
def _blocks(
    lengths: tuple[int, ...],
    chosen: tuple[int, ...] | None,
    external: bool,
    size: int,
    room: int,
    device: torch.device,
) -> tuple[Block, ...]:
    """Blocks of at most `room` chunks of `size` tokens."""
    first = [0, *accumulate(lengths)]
    parts: list[list[_Part]] = [[]]
    left = room
    for segment, number in enumerate(range(len(lengths)) if chosen is None else chosen):
        start, length = 0, lengths[number]
        while start < length or (external and start == length == 0):
            tokens = min(length - start, left * size)
            parts[-1].append(_Part(segment, first[number] + start, tokens, start > 0, start + tokens < length))
            start, left = start + tokens, left - -(-tokens // size)
            if left == 0:
                parts.append([])
                left = room
            if length == 0:
                break
    return tuple(_block(held, external, size, device) for held in parts if held)


def _block(parts: list[_Part], external: bool, size: int, device: torch.device) -> Block:
    lengths = tuple(part.tokens for part in parts)
    tied = tuple(i for i, part in enumerate(parts) if external or part.resumes or part.goes_on)
    segments = torch.tensor([parts[i].segment for i in tied], dtype=torch.int64, device=device)
    begin, end = parts[0].start, parts[-1].start + parts[-1].tokens
    tokens: slice | Tensor = slice(begin, end)
    if end - begin != sum(lengths):
        tokens = torch.cat([torch.arange(part.start, part.start + part.tokens) for part in parts]).to(device)
    return Block(tokens, _grid(lengths, tied, size, device), segments, parts[0].resumes, parts[-1].goes_on)


@lru_cache(maxsize=256)  # long segments are made of equal blocks
def _grid(lengths: tuple[int, ...], external: tuple[int, ...], size: int, device: torch.device) -> ChunkGrid:
    return chunk_grid(lengths, external, size, device)


class Gradients:
    """Gradients of q, k, v, log-decay and beta, block by block; in the states' dtype.

    Args:
        tokens: all.
        wanted: of which of the five.
    """

    def __init__(self, tokens: Tokens, wanted: Sequence[bool]) -> None:
        self.tokens, self.dtype = tokens, torch.promote_types(tokens.v.dtype, torch.float32)
        pairs = zip(tokens, wanted, strict=True)
        self.found = [self._room(x) if is_wanted and x is not None else None for x, is_wanted in pairs]

    def _room(self, x: Tensor) -> Tensor:
        if x.dim() == 1:  # of a decay per head: a sum over blocks
            return torch.zeros_like(x, dtype=self.dtype)
        return torch.empty_like(x, dtype=self.dtype, memory_format=torch.contiguous_format)

    def leaves(self, block: Block) -> Tokens:
        """The tokens of the block, to make factors of that `take` is given."""
        parts = [None if x is None else x.detach().to(self.dtype) for x in block.of(self.tokens)]
        for x, found in zip(parts, self.found, strict=True):
            if x is not None and found is not None:
                x.requires_grad_()
        return Tokens(*parts)  # type: ignore[arg-type]

    def take(self, block: Block, leaves: Tokens, factors: Pairs, first: str = NAMES, more: str = "") -> None:
        """What the factors' gradients make those of the block's tokens: of `first` all there is, of `more` to be added."""
        given = [(x, dx) for x, dx in factors if x is not None and x.requires_grad]
        places = [i for i, name in enumerate(NAMES) if name in first + more and self.found[i] is not None]
        if not given or not places:
            return
        outputs, d_outputs = zip(*given, strict=True)
        inputs = [x for i, x in enumerate(leaves) if x is not None and i in places]
        grads = torch.autograd.grad(outputs, inputs, d_outputs, allow_unused=True, materialize_grads=True)
        for i, grad in zip(places, grads, strict=True):
            found = self.found[i]
            assert found is not None
            if found.dim() == 1:
                found += grad
            elif NAMES[i] in more:
                found[block.tokens] += grad
            else:
                block.write(found, grad)

    def of(self, names: str) -> tuple[Tensor | None, ...]:
        """All of these, in the inputs' dtypes."""
        chosen = [(x, found) for name, x, found in zip(NAMES, self.tokens, self.found, strict=True) if name in names]
        return tuple(None if x is None or found is None else found.to(x.dtype) for x, found in chosen)
