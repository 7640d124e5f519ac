"""Linear attention by chunks, in two phases around the exchange of states. Differentiable PyTorch; the mathematics is in README.md."""

from dataclasses import dataclass

import torch
from lsys.kernels.linear_attention.grid import ChunkGrid
from lsys.kernels.linear_attention.scan import scan
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """Inputs by chunk: n chunks of C tokens, H heads.

    Attributes:
        q, k: [n, H, C, K], v: [n, H, C, V]; q is scaled.
        log_gate: sum of the log-decays from the chunk's start up to and with each token, [n, H, C]; None without decay.
        mask: decay from column token to row token, 0 above the diagonal, [n or 1, H or 1, C, C].
    """

    grid: ChunkGrid
    q: Tensor
    k: Tensor
    v: Tensor
    log_gate: Tensor | None
    mask: Tensor


@dataclass(frozen=True)
class SegmentMap:
    """What each segment does to a state, S -> exp(log_decay) S + state, with what `apply` needs again.

    Attributes:
        log_decay: [N, H], state: [N, H, K, V], of the segments.
        before: state before each chunk if its segment began with zero, [n, H, K, V].
        log_decay_before: log-decay from its segment's start to each chunk, [n, H].
    """

    log_decay: Tensor
    state: Tensor
    before: Tensor
    log_decay_before: Tensor


def prepare(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, grid: ChunkGrid, scale: float) -> Chunks:
    """q, k [T, H_k, K], v [T, H, V], log_decay None | [H] | [T, H] -> inputs by chunk."""
    repeat = v.shape[1] // k.shape[1]
    q, k, v = (_by_head(grid, x, n) for x, n in ((q * scale, repeat), (k, repeat), (v, 1)))
    work = torch.promote_types(v.dtype, torch.float32)
    lower = torch.ones(grid.size, grid.size, dtype=torch.bool, device=v.device).tril()
    if log_decay is None:
        return Chunks(grid, q, k, v, None, lower.to(v.dtype)[None, None])
    log_decay = log_decay.to(work)
    if log_decay.dim() == 1:
        place = torch.arange(1, grid.size + 1, device=v.device)
        counted = torch.minimum(place, grid.filled.to(v.device)[:, None]).to(work)  # padding decays nothing
        log_gate = counted[:, None] * log_decay[:, None]  # [n, 1, C] * [H, 1] -> [n, H, C]
        distance = (place[:, None] - place).clamp(min=0).to(work)
        exponent = (distance * log_decay[:, None, None])[None]  # [1, H, C, C]
    else:
        log_gate = grid.spread(log_decay).transpose(1, 2).cumsum(-1)  # [T, H] -> [n, H, C]
        exponent = (log_gate[..., :, None] - log_gate[..., None, :]).masked_fill(
            ~lower, 0.0
        )  # never of a positive number
    return Chunks(grid, q, k, v, log_gate, (exponent.exp() * lower).to(v.dtype))


def segment_map(chunks: Chunks) -> SegmentMap:
    """Phase 1: the map of every segment. Needs no other rank."""
    work = torch.promote_types(chunks.v.dtype, torch.float32)
    k = chunks.k
    if chunks.log_gate is not None:
        total = chunks.log_gate[..., -1]  # [n, H]
        k = k * (total[..., None] - chunks.log_gate).exp().to(k.dtype)[..., None]
    else:
        total = chunks.k.new_zeros(chunks.v.shape[:2], dtype=work)
    updates = (k.transpose(-1, -2) @ chunks.v).to(work)  # [n, H, K, V]
    before, state = scan(updates, total, chunks.grid.chain)
    chain = chunks.grid.chain
    group = chain.group.to(total.device)
    log_decay = total.new_zeros(len(chain.sizes), total.shape[1]).index_add(0, group, total)
    running = total.cumsum(0) - total  # from the first chunk of all
    first = (torch.tensor(chain.sizes, dtype=torch.int64).cumsum(0) - torch.tensor(chain.sizes, dtype=torch.int64)).to(
        group.device
    )
    log_decay_before = (running - running[first[group]]) if len(group) else running
    return SegmentMap(log_decay, state, before, log_decay_before)


def intra(chunks: Chunks) -> Tensor:
    """What tokens get from their own chunk, [n, H, C, V]. Independent of any state: an exchange can be under way meanwhile."""
    return ((chunks.q @ chunks.k.transpose(-1, -2)) * chunks.mask) @ chunks.v


def apply(chunks: Chunks, inside: Tensor, maps: SegmentMap, state: Tensor | None) -> Tensor:
    """Phase 2: add what comes from before the chunk.

    Args:
        inside: `intra(chunks)`.
        state: state before each segment, [N, H, K, V]; None is zero.

    Returns:
        o [T, H, V].
    """
    before = maps.before
    if state is not None:
        group = chunks.grid.chain.group.to(before.device)
        before = before + maps.log_decay_before.exp()[..., None, None] * state.to(before.dtype)[group]
    q = chunks.q if chunks.log_gate is None else chunks.q * chunks.log_gate.exp().to(chunks.q.dtype)[..., None]
    o = inside + q @ before.to(q.dtype)
    return chunks.grid.collect(o.transpose(1, 2))  # [n, H, C, V] -> [n, C, H, V] -> [T, H, V]


def _by_head(grid: ChunkGrid, x: Tensor, repeat: int) -> Tensor:
    """[T, h, D] -> [n, h * repeat, C, D]"""
    x = grid.spread(x).transpose(1, 2)
    return x.repeat_interleave(repeat, 1) if repeat > 1 else x.contiguous()
