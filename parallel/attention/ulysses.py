"""Attention by exchanging heads for tokens (DeepSpeed-Ulysses, Jacobs et al., 2023) around another way of attention.

In each group of ranks, every member gets all the group's tokens for its share of the heads; members with the same share
then attend across groups along a schedule. One group of all ranks is Ulysses; groups of one rank each are the schedule
alone; between them, with a ring, it is the 2-D scheme of USP (Fang and Zhao, 2024).
"""

from __future__ import annotations

from torch import Tensor

from lsys.parallel.attention import executor
from lsys.parallel.attention.heads import HeadExchange, HeadsIn, HeadsOut, pieces
from lsys.parallel.attention.route import Generator
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages.heads import Groups, shares


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    generator: Generator,
    groups: Groups,
    options: executor.Options,
) -> Tensor:
    """q [T_r, H, D], k, v [T_r, H_kv, D] -> [T_r, H, D]; `generator` as for `executor.attention`, over the groups."""
    members = len(groups[0])
    if comm is None or members == 1:
        return executor.attention(q, k, v, layout, comm, generator, options)
    number = next(number for number, group in enumerate(groups) if comm.rank in group)
    exchange = HeadExchange(comm, layout, groups[number], shares(q.shape[1], k.shape[1], members))
    place = groups[number].index(comm.rank)
    q_, k_, v_ = HeadsIn.apply(q, k, v, exchange)  # [T_r, H, D] -> [T_g, H_share, D]
    o = executor.attention(
        q_,
        k_,
        v_,
        layout.pooled(groups),
        comm,
        generator,
        options,
        rank=number,
        peers=tuple(group[place] for group in groups),
        heads=pieces(exchange.share, q.shape[1] // k.shape[1]),
    )
    return HeadsOut.apply(o, exchange)  # [T_g, H_share, D] -> [T_r, H, D]
