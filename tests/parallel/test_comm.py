from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lsys.parallel.comm import SequenceComm

UNEVEN = {1: [[3]], 2: [[3, 0], [1, 4]], 3: [[2, 0, 5], [0, 0, 0]], 4: [[1, 7, 0, 3], [2, 2, 2, 2]]}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def _values(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers, exact in every dtype and in their sums."""
    return (torch.arange(rows * 6).reshape(rows, 2, 3) % 7 + rank).to(dtype)


def _gather_and_scatter(rank: int, world_size: int) -> None:
    comm = SequenceComm(None)
    for sizes in UNEVEN[world_size]:
        for dtype in DTYPES:
            gathered = torch.cat([_values(r, n, dtype) for r, n in enumerate(sizes)])
            mine = _values(rank, sizes[rank], dtype).transpose(1, 2).contiguous().transpose(1, 2)  # not dense
            assert torch.equal(comm.all_gather(mine, sizes), gathered)
            pending = comm.all_gather_async(mine, sizes)
            assert torch.equal(pending.wait(), gathered) and pending.wait() is pending.wait()
            exact = comm.all_gather_async(mine, sizes, exact=True).then(lambda rows: (rows, len(rows)))
            assert torch.equal(exact.wait()[0], gathered) and exact.wait()[1] == sum(sizes)
            summed: Any = sum(_values(r, sum(sizes), dtype) for r in range(world_size))
            part = comm.reduce_scatter(_values(rank, sum(sizes), dtype), sizes)
            assert torch.equal(part, summed.split(sizes)[rank])
    even = _values(rank, 2, torch.float32)
    assert torch.equal(comm.all_gather(even), torch.cat([_values(r, 2, torch.float32) for r in range(world_size)]))
    assert torch.equal(comm.reduce_scatter(comm.all_gather(even)), even * world_size)


def _costs(rank: int, world_size: int) -> tuple:
    """Of an exact gather and of a scatter: the backend's collectives that ran, and numbers received."""
    comm, sizes, received = SequenceComm(None), [20, 1, 3], []
    with (
        mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as points,
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanges,
        mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gathers,
        mock.patch.object(dist, "reduce_scatter_tensor") as scatters,
    ):
        comm.all_gather_async(torch.zeros(sizes[rank], 2), sizes, exact=True).wait()
        received.append(sum(op.tensor.numel() for op in points.call_args.args[0] if op.op is dist.irecv))
        comm.reduce_scatter(torch.zeros(24, 2), sizes)
        received.append(exchanges.call_args.args[0].numel() - sizes[rank] * 2)
        assert not gathers.called and not scatters.called
        comm.all_gather_async(torch.zeros(4 + rank % 2), [4, 5, 4], exact=True).wait()
        assert gathers.call_count == 1  # nearly equal: padded
    return tuple(received)


def _precise(rank: int, world_size: int) -> float:
    return SequenceComm(None).reduce_scatter(torch.full((3, 1), [256.0, 1.0, 1.0][rank], dtype=torch.bfloat16)).item()


def _exchange(rank: int, world_size: int) -> None:
    comm = SequenceComm(None)
    rows = [[(3 * source + target) % 4 for target in range(world_size)] for source in range(world_size)]
    for dtype in DTYPES:
        # What source sends to target is marked with both.
        blocks = [[_values(10 * s + t, rows[s][t], dtype) for t in range(world_size)] for s in range(world_size)]
        sent, received = rows[rank], [rows[source][rank] for source in range(world_size)]
        got = comm.all_to_all(torch.cat(blocks[rank]), sent, received)
        assert torch.equal(got, torch.cat([blocks[source][rank] for source in range(world_size)]))
    even = torch.arange(world_size) + 10 * rank
    assert comm.all_to_all(even).tolist() == [10 * source + rank for source in range(world_size)]


def _point_to_point(rank: int, world_size: int) -> None:
    comm = SequenceComm(None)
    peers = [peer for peer in range(world_size) if peer != rank]
    for dtype in DTYPES:  # every pair both ways at once, some messages empty
        send = {peer: _values(10 * rank + peer, (rank + 2 * peer) % 3, dtype) for peer in peers}
        receive = {peer: torch.full(((peer + 2 * rank) % 3, 2, 3), -1, dtype=dtype) for peer in peers}
        pending = comm.exchange(send, receive)
        got = pending.wait()
        assert pending.wait() is got
        for peer in peers:
            assert torch.equal(got[peer], _values(10 * peer + rank, (peer + 2 * rank) % 3, dtype))
    following, preceding = (rank + 1) % world_size, (rank - 1) % world_size  # a ring, two messages under way
    if world_size > 1:
        first = comm.exchange({following: torch.tensor([rank])}, {preceding: torch.zeros(1, dtype=torch.int64)})
        second = comm.exchange({following: torch.tensor([-rank])}, {preceding: torch.zeros(1, dtype=torch.int64)})
        assert second.wait()[preceding].item() == -preceding and first.wait()[preceding].item() == preceding


def _describe(rank: int, world_size: int) -> tuple:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    comm = SequenceComm(pairs[rank // 2], node_of_rank=[0, 1], axis="pair")
    with pytest.raises(ValueError, match="is not in the pair group"):
        SequenceComm(pairs[1 - rank // 2], axis="pair")
    with pytest.raises(ValueError, match="node_of_rank names 3 ranks; the context group has 4"):
        SequenceComm(None, node_of_rank=[0, 0, 1])
    gathered = comm.all_gather(torch.tensor([rank])).tolist()
    return comm.rank, comm.size, comm.ranks, comm.node_of_rank, gathered


def _misuse(rank: int, world_size: int) -> None:
    comm = SequenceComm(None)
    for call, message in [
        (lambda: comm.all_gather(torch.zeros(3), [2, 2]), "gathers 3 rows; sizes says 2"),
        (lambda: comm.all_gather(torch.zeros(3), [3]), "sizes names 1 ranks; the context group has 2"),
        (lambda: comm.reduce_scatter(torch.zeros(3), [2, 2]), "takes 4 rows"),
        (lambda: comm.reduce_scatter(torch.zeros(3)), "3 rows do not part equally over 2 ranks"),
        (lambda: comm.all_to_all(torch.zeros(3), [2, 2], [2, 2]), "takes 4 rows"),
        (lambda: comm.all_to_all(torch.zeros(3)), "3 rows do not part equally over 2 ranks"),
        (lambda: comm.all_to_all(torch.zeros(4), [2, 2], [1, 1]), "sends itself 2 rows but expects 1"),
        (lambda: comm.exchange({rank: torch.zeros(1)}, {}), f"rank {rank} is no peer"),
        (lambda: comm.exchange({1 - rank: torch.zeros(2, 3).t()}, {}), "is not contiguous"),
    ]:
        # Only one rank sends itself what the others receive: the last message names the rank that is asked.
        if "itself" not in message or rank == 0:
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gather_and_scatter_uneven_rows(gloo, world_size):
    gloo(world_size, _gather_and_scatter)


def test_uneven_rows_are_not_padded_and_sums_not_reduced_for_all(gloo):
    assert gloo(3, _costs) == [(4 * 2, 2 * 20 * 2), (23 * 2, 2 * 1 * 2), (21 * 2, 2 * 3 * 2)]


def test_half_precision_is_summed_in_fp32(gloo):
    assert gloo(3, _precise) == [258.0] * 3  # 256 + 1 is 256 in bfloat16


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_to_all_uneven_rows(gloo, world_size):
    gloo(world_size, _exchange)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_point_to_point(gloo, world_size):
    gloo(world_size, _point_to_point)


def test_a_comm_knows_its_ranks_and_nodes(gloo):
    described = gloo(4, _describe)
    assert described[1] == (1, 2, (0, 1), (0, 1), [0, 1])
    assert described[2] == (0, 2, (2, 3), (0, 1), [2, 3])


def test_wrong_sizes_are_refused_before_anything_is_sent(gloo):
    gloo(2, _misuse)


def test_a_comm_needs_a_process_group():
    with pytest.raises(ValueError, match="no process group exists"):
        SequenceComm(None)
