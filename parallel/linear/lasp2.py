"""LASP-2 (Sun et al., 2025): one all-gather of segment maps each way, for any layout.

Every segment of a document acts on the state that enters it: S -> exp(A) S + B. Ranks gather (A, B) of the documents that cross ranks, and each
composes, by position in the document, the states that enter its own segments. The gather is under way while the rank computes what tokens
get from their own chunk. Backward gathers the gradients of those states once, and composes them from the end.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsys.kernels.linear_attention import Chain, chunk_grid, chunked, scan, scan_adjoint
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout


@dataclass(frozen=True)
class Exchange:
    """Which segments travel, and how they follow one another. Alike on all ranks but for `mine`.

    Attributes:
        documents: documents whose segments travel, int64 [D].
        chain: gathered segments in order: by document, by position.
        order: gathered row (rank by rank) of each segment in that order, int64 [R].
        counts: segments that each rank sends.
        sent: of this rank's segments, those that it sends, int64. mine: their places in the order.
    """

    documents: Tensor
    chain: Chain
    order: Tensor
    counts: tuple[int, ...]
    sent: Tensor
    mine: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """As `lsys.parallel.linear.linear_attention`, inputs checked."""
    rank = 0 if comm is None else comm.rank
    exchange = plan(layout, rank, output_final_state)
    lengths = tuple(segment.length for segment in layout.segments[rank])
    chunks = chunked.prepare(q, k, v, log_decay, chunk_grid(lengths, k.shape[-1], v.shape[-1]), scale)
    maps = chunked.segment_map(chunks)
    if initial_state is None:
        initial_state = maps.state.new_zeros(len(layout.lengths), *maps.state.shape[1:])
    initial_state = initial_state.to(maps.state.dtype)
    documents = layout.derived(("segment documents", rank), v.device, lambda: _segment_documents(layout, rank))
    entering = initial_state.index_select(0, documents)  # right for segments that begin a document
    if len(exchange.documents) == 0:
        o = chunked.apply(chunks, chunked.intra(chunks), maps, entering)
        return o, initial_state if output_final_state else None
    sent, travelling = exchange.sent.to(v.device), exchange.documents.to(v.device)
    packed = _pack(maps.log_decay.detach()[sent], maps.state.detach()[sent])
    pending = None if comm is None else comm.all_gather_async(packed, exchange.counts)
    inside = chunked.intra(chunks)
    gathered = packed if pending is None else pending.wait()
    states, after = _States.apply(
        maps.log_decay[sent], maps.state[sent], initial_state[travelling], gathered, exchange, comm, output_final_state
    )
    o = chunked.apply(chunks, inside, maps, entering.index_copy(0, sent, states))
    return o, initial_state.index_copy(0, travelling, after) if output_final_state else None


def plan(layout: SequenceLayout, rank: int, all_documents: bool) -> Exchange:
    """Which segments travel: those of documents in several segments, or of all documents if their final states are wanted everywhere."""
    return layout.derived(("lasp2", rank, all_documents), None, lambda: _plan(layout, rank, all_documents))


def position_order(segments: list[tuple[int, int]]) -> list[int]:
    """Order of segments (document, start) by document and position, whatever rank holds them."""
    return sorted(range(len(segments)), key=segments.__getitem__)


def _plan(layout: SequenceLayout, rank: int, all_documents: bool) -> Exchange:
    times: dict[int, int] = {}
    for segments in layout.segments:
        for segment in segments:
            times[segment.document] = times.get(segment.document, 0) + 1
    wanted = {d for d, count in times.items() if count > 1 or all_documents}
    sent = [[i for i, s in enumerate(segments) if s.document in wanted] for segments in layout.segments]
    rows = [(layout.segments[r][i].document, layout.segments[r][i].start) for r, each in enumerate(sent) for i in each]
    order = position_order(rows)
    documents = sorted(wanted)
    place = torch.empty(len(rows), dtype=torch.int64)
    place[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(rows))
    first = sum(len(each) for each in sent[:rank])
    return Exchange(
        documents=torch.tensor(documents, dtype=torch.int64),
        chain=Chain(tuple(times[d] for d in documents)),
        order=torch.tensor(order, dtype=torch.int64),
        counts=tuple(len(each) for each in sent),
        sent=torch.tensor(sent[rank], dtype=torch.int64),
        mine=place[first : first + len(sent[rank])],
    )


class _States(torch.autograd.Function):
    """(log-decay, state) of my travelling segments -> states entering them, and states after the travelling documents."""

    @staticmethod
    def forward(
        ctx: Any,
        log_decay: Tensor,
        state: Tensor,
        initial: Tensor,
        gathered: Tensor,
        exchange: Exchange,
        comm: SequenceComm | None,
        with_final: bool,
    ) -> tuple[Tensor, Tensor]:
        decays, states = _unpack(gathered[exchange.order.to(gathered.device)], state)
        before, after = scan(states, decays, exchange.chain, initial)
        entering = before[exchange.mine.to(state.device)]
        ctx.save_for_backward(decays.exp(), entering, log_decay)
        ctx.exchange, ctx.comm, ctx.with_final = exchange, comm, with_final
        return entering, after

    @staticmethod
    def backward(ctx: Any, d_entering: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        decay, entering, log_decay = ctx.saved_tensors
        exchange, comm = ctx.exchange, ctx.comm
        if comm is not None:
            d_entering = comm.all_gather(d_entering.contiguous(), exchange.counts)
            if ctx.with_final:  # a replicated output: what the ranks ask of it adds up
                d_after = comm.all_gather(d_after.contiguous()[None]).sum(0)
        d_before = d_entering[exchange.order.to(decay.device)]
        d_states, d_initial = scan_adjoint(d_before, d_after, decay, exchange.chain)
        d_state = d_states[exchange.mine.to(decay.device)]
        d_log_decay = (d_state * entering).sum((-2, -1)) * log_decay.exp()
        if comm is not None and comm.rank != 0:
            d_initial = torch.zeros_like(
                d_initial
            )  # every rank has it whole; the parts of a replicated input add up to it
        return d_log_decay, d_state, d_initial, None, None, None, None


def _pack(log_decay: Tensor, state: Tensor) -> Tensor:
    """[R, H], [R, H, K, V] -> [R, H, 1 + K V]"""
    return torch.cat((log_decay[..., None], state.flatten(2)), -1)


def _unpack(packed: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return packed[..., 0], packed[..., 1:].reshape(-1, *like.shape[1:])


def _segment_documents(layout: SequenceLayout, rank: int) -> Tensor:
    return torch.tensor([segment.document for segment in layout.segments[rank]], dtype=torch.int64)
