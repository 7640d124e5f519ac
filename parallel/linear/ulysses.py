"""Linear attention by exchanging heads for tokens (DeepSpeed-Ulysses, Jacobs et al., 2023).

Every rank gets all tokens for its share of the heads, runs the attention of one device on whole documents, and the
output goes back: two all-to-alls each way, whatever the depth of the documents. Log-decays and betas of tokens travel
with their heads, in one message with queries, keys and values. No count divides another: shares differ by one head at
most, key heads that several ranks read are sent to each of them, and ranks beyond the number of heads have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels import linear_attention as kernel
from lsys.parallel.attention.heads import HeadExchange, HeadsOut
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear.exchange import GatherRows
from lsys.parallel.messages.heads import Share, shares

Like = tuple[torch.Size, torch.dtype]  # of a tensor of tokens: its shape [heads ...], its dtype


def attention(
    inputs: Sequence[Tensor | None],
    layout: SequenceLayout,
    comm: SequenceComm,
    initial: Tensor | None,
    final: bool,
    causal: bool,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`inputs`: q, k, v, log_decay, beta as in `lsys.parallel.linear.linear_attention`; o [T_r, H, V] and final states."""
    q, k, v, log_decay, beta = inputs
    assert q is not None and k is not None and v is not None
    heads, key_heads = v.shape[1], k.shape[1]
    everyone = tuple(range(comm.size))
    exchange = HeadExchange(comm, layout, everyone, shares(heads, key_heads, comm.size))
    share = exchange.share
    travels = [q, k, v]
    fixed = log_decay if log_decay is not None and log_decay.dim() == 1 else None
    travels += [x for x in (None if fixed is not None else log_decay, beta) if x is not None]
    q, k, v, *gates = HeadsIn.apply(exchange, *travels)  # [T_r, H, D] -> [T, H_share, D]
    beta = None if beta is None else gates.pop()
    log_decay = gates[0] if gates else None if fixed is None else fixed[share.query]
    o, states = v, None
    initial = None if initial is None else initial[:, share.query]
    if v.shape[1]:
        keys = _keys(share, heads // key_heads, v.device)
        q, k = (x if keys is None else x.index_select(1, keys) for x in (q, k))
        given = (None if x is None else x[None] if x.dim() > 1 else x for x in (q, k, v, log_decay, beta))
        options = dict(initial_state=initial, output_final_state=final, causal=causal, scale=scale, backend=backend)
        o, states = kernel.linear_attention(*given, cu_seqlens=layout.document_offsets, **options)  # type: ignore[arg-type]
        o = o[0]
    else:
        # Without a head the output depends on what has not travelled, too: all ranks take part in the backward pass.
        o = v + sum(x.sum() for x in (None if fixed is None else log_decay, initial) if x is not None)
        wide = torch.promote_types(v.dtype, torch.float32)
        states = v.new_zeros(len(layout.lengths), 0, k.shape[2], v.shape[2], dtype=wide) if final else None
    o = HeadsOut.apply(o, exchange)  # [T, H_share, V] -> [T_r, H, V]
    if states is None:
        return o, None
    # [documents, H_share, K, V] -> [documents, H, K, V]
    sizes = [each.queries for each in exchange.shares]
    states, o = GatherRows.apply(states.transpose(0, 1).contiguous(), o, comm, sizes)
    return o, states.transpose(0, 1)


def _keys(share: Share, group: int, device: torch.device) -> Tensor | None:
    """The key head of each head of a share; None if all key heads are read by equally many, in order."""
    own = torch.arange(share.query.start, share.query.stop) // group - share.key.start
    keys = share.keys
    if len(own) % keys == 0 and torch.equal(own, torch.arange(len(own)) // (len(own) // keys)):
        return None
    return own.to(device)


class HeadsIn(torch.autograd.Function):
    """Tensors of tokens: q, k [T_r, H_k, K], others [T_r, H ...] -> of all tokens, the own share of heads.

    Backward sums the gradients of key heads that several ranks have, in fp32 (fp64 for fp64).
    """

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.like = exchange, [(x.shape[1:], x.dtype) for x in tensors]
        parts = [_pack([x[:, heads] for x, heads in zip(tensors, _heads(s), strict=False)]) for s in exchange.shares]
        return _unpack(exchange.to_heads(parts), exchange.share, ctx.like)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: HeadExchange = ctx.exchange
        widths = [_width(share, ctx.like) for share in exchange.shares]
        parts = exchange.to_tokens(_pack(grads), widths)
        split = [_unpack(part, share, ctx.like) for part, share in zip(parts, exchange.shares, strict=True)]
        summed = []
        for number, (shape, dtype) in enumerate(ctx.like):
            wide = torch.promote_types(dtype, torch.float32)
            total = split[0][number].new_zeros(len(parts[0]), *shape, dtype=wide)
            for found, share in zip(split, exchange.shares, strict=True):
                total[:, _heads(share)[number]] += found[number]
            summed.append(total.to(dtype))
        return None, *summed


def _count(heads: slice) -> int:
    return heads.stop - heads.start


def _heads(share: Share) -> tuple[slice, ...]:
    """Those of each tensor: queries and keys go by key heads, all others by value heads. Its end repeats."""
    return share.key, share.key, *[share.query] * 3


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of one head of one token."""
    return math.prod(shape[1:]) * dtype.itemsize


def _width(share: Share, like: Sequence[Like]) -> int:
    """Bytes a token."""
    return sum(_count(heads) * _bytes(*each) for heads, each in zip(_heads(share), like, strict=False))


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """[T, heads ...] of any dtypes -> their bytes, [T, w, 1]."""
    rows = [x.reshape(len(x), math.prod(x.shape[1:])).contiguous().view(torch.uint8) for x in tensors]
    return torch.cat(rows, 1).unsqueeze(-1)


def _unpack(packed: Tensor, share: Share, like: Sequence[Like]) -> tuple[Tensor, ...]:
    """The inverse of `_pack`, for the heads of a share."""
    counts = [_count(heads) for heads, _ in zip(_heads(share), like, strict=False)]
    widths = [count * _bytes(*each) for count, each in zip(counts, like, strict=True)]
    parts = zip(packed.squeeze(-1).split(widths, 1), counts, like, strict=True)
    # Of no heads, rows of no bytes: as a matrix they could not be viewed in a wider type.
    return tuple(x.flatten().view(dtype).view(len(x), n, *shape[1:]) for x, n, (shape, dtype) in parts)
