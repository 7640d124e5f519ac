"""The ledger against formulas written here, for every operation, and against the network interface's counters."""

import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.lab import SCRIPT, Lab, LabUnavailable, interface_bytes, lab
from torch import Tensor

from lsys.parallel.ledger import NETWORK, NODE, OTHER, WORLD, label, record

NODES = {1: [0], 2: [0, 1], 3: [0, 0, 1], 4: [0, 0, 1, 1]}  # of each rank, by number of ranks
N = 12 * 5  # elements of the tensors below; 12 is a multiple of all numbers of ranks


# ---- every operation of torch.distributed


def wait_for(works):
    for work in works:
        assert work is not None  # each rank is in the group
        work.wait()


def _floats(count: int) -> Tensor:
    return torch.ones(count)


def _splits(rank: int, ranks: int) -> tuple[list[int], list[int]]:
    """Rows that a rank sends and receives in the uneven all-to-all; some are none."""
    return [_rows(rank, peer) for peer in range(ranks)], [_rows(peer, rank) for peer in range(ranks)]


def _rows(source: int, destination: int) -> int:
    return (3 * source + 5 * destination) % 4


def _batch(rank: int, ranks: int, group: dist.ProcessGroup) -> list[dist.Work]:
    following, before = (rank + 1) % ranks, (rank - 1) % ranks
    send = dist.P2POp(dist.isend, _floats(N + rank), group=group, group_peer=following)
    receive = dist.P2POp(dist.irecv, _floats(N + before), group=group, group_peer=before)
    return dist.batch_isend_irecv([send, receive])


def _coalesced(group: dist.ProcessGroup, *operations) -> None:
    with dist._coalescing_manager(group, async_ops=True) as manager:
        for operation, *tensors in operations:
            operation(*tensors, group=group)
    manager.wait()


def _operations(rank: int, ranks: int, group: dist.ProcessGroup):
    """Name -> what issues it, on float32 tensors."""
    part, whole = N // 12, N // 12 * ranks
    send, receive = _splits(rank, ranks)
    last = ranks - 1
    at_last = (lambda make: make()) if rank == last else (lambda make: None)
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor
    calls = {
        "all_reduce": lambda: dist.all_reduce(_floats(N), group=group),
        "all_reduce, async": lambda: dist.all_reduce(_floats(N), group=group, async_op=True).wait(),
        "all_reduce of doubles": lambda: dist.all_reduce(_floats(N).double(), group=group),
        "all_reduce, coalesced": lambda: _coalesced(
            group, (dist.all_reduce, _floats(N)), (dist.all_reduce, _floats(N))
        ),
        "all_gather_into_tensor": lambda: gather(_floats(whole), _floats(part), group=group),
        "all_gather of a list": lambda: dist.all_gather(
            [_floats(part) for _ in range(ranks)], _floats(part), group=group
        ),
        "all_gather, coalesced": lambda: _coalesced(group, *[(gather, _floats(whole), _floats(part))] * 2),
        "reduce_scatter_tensor": lambda: scatter(_floats(part), _floats(whole), group=group),
        "reduce_scatter of a list": lambda: dist.reduce_scatter(
            _floats(part), [_floats(part) for _ in range(ranks)], group=group
        ),
        "reduce_scatter, coalesced": lambda: _coalesced(group, *[(scatter, _floats(part), _floats(whole))] * 2),
        "all_to_all_single": lambda: dist.all_to_all_single(_floats(whole), _floats(whole), group=group),
        "all_to_all_single, uneven": lambda: dist.all_to_all_single(
            torch.ones(sum(receive), 7), torch.ones(sum(send), 7), receive, send, group=group
        ),
        "all_to_all of lists": lambda: dist.all_to_all(
            [_floats(part) for _ in range(ranks)], [_floats(part) for _ in range(ranks)], group=group
        ),
        "all_to_all of nothing": lambda: dist.all_to_all_single(_floats(0), _floats(0), group=group),
        "broadcast from first": lambda: dist.broadcast(_floats(N), group=group, group_src=0),
        "broadcast from last": lambda: dist.broadcast(_floats(N), group=group, group_src=last),
        "reduce": lambda: dist.reduce(_floats(N), group=group, group_dst=last),
        "gather": lambda: dist.gather(
            _floats(part), at_last(lambda: [_floats(part) for _ in range(ranks)]), group=group, group_dst=last
        ),
        "scatter": lambda: dist.scatter(
            _floats(part), at_last(lambda: [_floats(part) for _ in range(ranks)]), group=group, group_src=last
        ),
        "barrier": lambda: dist.barrier(group),
        "all_reduce of nothing": lambda: dist.all_reduce(_floats(0), group=group),
    }
    if ranks > 1:
        calls["batch of sends and receives"] = lambda: [work.wait() for work in _batch(rank, ranks, group)]
        ends: dict[int, Callable[[], Any]] = {0: lambda: dist.send(_floats(N), group=group, group_dst=last)}
        ends[last] = lambda: dist.recv(_floats(N), group=group, group_src=0)
        calls["send to last"] = ends.get(rank, lambda: None)
    return calls


def _record_operations(rank: int, ranks: int):
    """What the ledger says of each operation: calls, bytes by way and link, whether times are in order."""
    group = dist.new_group(list(range(ranks)))
    label(group, "context", NODES[ranks])
    found = {}
    for name, operation in _operations(rank, ranks, group).items():
        with record() as ledger:
            operation()
        moved = {(way, link): ledger.bytes("context", link, direction=way) for way in WAYS for link in (NODE, NETWORK)}
        assert (
            ledger.bytes() == ledger.bytes(axis="context") == sum(e.sent[NODE] + e.sent[NETWORK] for e in ledger.events)
        )
        assert all(0 <= event.exposed <= event.seconds for event in ledger.events)
        assert ledger.seconds() == sum(e.seconds for e in ledger.events) and ledger.exposed() <= ledger.seconds()
        found[name] = ledger.calls(), moved
    return found


WAYS = ("sent", "received")


def _expected(ranks: int) -> dict[str, tuple[int, dict[tuple[int, int], int]]]:
    """Name -> operations a rank issues, and bytes by (source, destination), as gloo moves them."""
    part = 4 * N // 12
    ring = {(r, (r + 1) % ranks): ranks - 1 for r in range(ranks)} if ranks > 1 else {}  # slots of a pass around it
    pairs = [(s, d) for s in range(ranks) for d in range(ranks) if s != d]
    last = ranks - 1

    def times(slots: dict[tuple[int, int], int], n: float) -> dict[tuple[int, int], int]:
        return {ends: int(count * n) for ends, count in slots.items()}

    def tree(root: int) -> dict[tuple[int, int], int]:
        having, moved = [root], {}
        while len(having) < ranks:
            for source, destination in zip(list(having), range(len(having), ranks), strict=False):
                moved[source, (root + destination) % ranks] = 4 * N
                having.append((root + destination) % ranks)
        return moved

    reduce = defaultdict(int, times(ring, 4 * N / ranks))
    for rank in range(ranks - 1):
        reduce[rank, last] += 4 * N // ranks
    expected = {
        "all_reduce": (1, times(ring, 2 * 4 * N / ranks)),
        "all_reduce, async": (1, times(ring, 2 * 4 * N / ranks)),
        "all_reduce of doubles": (1, times(ring, 2 * 8 * N / ranks)),
        "all_reduce, coalesced": (1, times(ring, 2 * 2 * 4 * N / ranks)),
        "all_gather_into_tensor": (1, times(ring, part)),
        "all_gather of a list": (1, times(ring, part)),
        "all_gather, coalesced": (1, times(ring, 2 * part)),
        "reduce_scatter_tensor": (1, times(ring, 2 * part)),  # gloo reduces everything to everyone
        "reduce_scatter of a list": (1, times(ring, 2 * part)),
        "reduce_scatter, coalesced": (1, times(ring, 2 * 2 * part)),
        "all_to_all_single": (1, dict.fromkeys(pairs, part)),
        "all_to_all_single, uneven": (1, {(s, d): 28 * _rows(s, d) for s, d in pairs}),
        "all_to_all of lists": (1, dict.fromkeys(pairs, part)),
        "all_to_all of nothing": (1, {}),
        "broadcast from first": (1, tree(0)),
        "broadcast from last": (1, tree(last)),
        "reduce": (1, reduce),
        "gather": (1, {(r, last): part for r in range(ranks - 1)}),
        "scatter": (1, {(last, r): part for r in range(ranks - 1)}),
        "barrier": (1, {}),
        "all_reduce of nothing": (1, {}),
    }
    if ranks > 1:
        expected["batch of sends and receives"] = (2, {(r, (r + 1) % ranks): 4 * (N + r) for r in range(ranks)})
        expected["send to last"] = (1, {(0, last): 4 * N})
    return expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_bytes_of_every_operation_by_link(gloo, ranks):
    found, expected = gloo(ranks, _record_operations), _expected(ranks)
    assert all(each.keys() == expected.keys() for each in found)
    nodes = NODES[ranks]
    for name, (calls, moved) in expected.items():
        for rank in range(ranks):
            wanted = dict.fromkeys([(way, link) for way in WAYS for link in (NODE, NETWORK)], 0)
            for ends, count in moved.items():
                for way, end in zip(WAYS, ends, strict=True):
                    if end == rank:
                        wanted[way, NODE if nodes[ends[0]] == nodes[ends[1]] else NETWORK] += count
            issues = 0 if name == "send to last" and rank not in (0, ranks - 1) else calls
            assert found[rank][name] == (issues, wanted), f"{name}, rank {rank} of {ranks}"


# ---- labels, contexts, threads


def _methods() -> dict[str, object]:
    return {
        f"{owner.__name__}.{name}": value
        for owner in (dist.ProcessGroup, dist.Work)
        for name, value in vars(owner).items()
    }


def _contexts(rank: int, ranks: int) -> None:
    before = _methods()
    with record() as outer:
        assert _methods() != before
        dist.all_reduce(_floats(4))
        with record() as inner:
            pending = dist.all_reduce(_floats(4), async_op=True)
            dist.all_reduce(_floats(4))
        pending.wait()  # the outer ledger still records
        assert _methods() != before
        first = outer.take()
        dist.barrier()
        with pytest.raises(RuntimeError, match="planted"), record():
            raise RuntimeError("planted")
    assert (first.calls(), inner.calls(), outer.calls()) == (3, 2, 1)
    assert first.seconds() > 0 and outer.events[0].operation.kind == "barrier"
    dist.all_reduce(_floats(4))
    assert outer.calls() == 1
    after = _methods()
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert {e.axis for e in first.events} == {OTHER}


def test_methods_are_the_originals_outside_of_a_recording(gloo):
    gloo(2, _contexts)


def _labels(rank: int, ranks: int) -> None:
    tensor, data = dist.new_group([0, 1]), dist.new_group([0, 1])
    label(tensor, "tensor", [0, 1])
    label(data, "data")
    with record() as ledger:
        for group in (tensor, data, None):
            dist.all_reduce(_floats(4), group=group)
        peer = 1 - rank
        works = [dist.isend(_floats(3), peer), dist.irecv(_floats(3), peer)]  # on the default group, without a label
        label(None, WORLD)
        works += [dist.isend(_floats(3), peer), dist.irecv(_floats(3), peer)]
        dist.all_reduce(_floats(4))
        wait_for(works)
        label(None, "pipeline")
        dist.all_reduce(_floats(4))
        ends = [dist.irecv(_floats(2)), dist.isend(_floats(2), peer)]  # from whichever rank
        wait_for(ends)
    assert [ledger.calls(axis) for axis in ("tensor", "data", OTHER, WORLD, "pipeline")] == [5, 1, 1, 1, 3]
    # Groups that were labelled without nodes have them from those labelled with.
    assert ledger.calls(link=NETWORK) == 11 and ledger.bytes(link=NODE) == 0
    assert ledger.bytes("tensor", op="send") == 24 == ledger.bytes("tensor", op="recv", direction="received")
    assert "pipeline" in ledger.table() and len(ledger.table().splitlines()) == 1 + 9
    with pytest.raises(ValueError, match="no link class"):
        ledger.bytes(link="nvlink")
    with pytest.raises(ValueError, match="sent or received"):
        ledger.bytes(direction="up")
    with pytest.raises(ValueError, match="names 3 ranks"):
        label(tensor, "tensor", [0, 0, 0])


def test_labels_give_axes_and_nodes(gloo):
    gloo(2, _labels)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


def _waiting(rank: int, ranks: int):
    with record() as ledger:
        dist.barrier()
        if rank:
            time.sleep(0.4)
        dist.all_reduce(_floats(4))
        pending = dist.all_reduce(_floats(4), async_op=True)
        time.sleep(0.4)
        pending.wait()
        x = _floats(3).requires_grad_()
        _Sum.apply(x).sum().backward()
    return ledger.events[1:]


def test_exposed_is_the_time_that_the_thread_stood_still(gloo):
    (early, _, _), (late, _, _) = found = gloo(2, _waiting)
    assert early.exposed > late.exposed + 0.1
    for _, hidden, backward in found:
        assert hidden.seconds >= 0.4 and hidden.exposed < hidden.seconds / 2
        assert backward.operation.bytes == 12


# ---- the network's own count


@pytest.fixture(scope="module")
def two_nodes():
    try:
        with lab(2) as nodes:
            yield nodes
    except LabUnavailable as error:
        pytest.skip(f"needs network namespaces: {error}")


def _mix(rank: int, ranks: int) -> tuple[dict[str, int], tuple[int, int]]:
    """Bytes by the ledger, and by the interface, of several operations of some MB."""
    import lsys.parallel.comm as parallel

    comm = parallel.SequenceComm(None, node_of_rank=[0, 1])
    label(comm.group, comm.axis, comm.node_of_rank)
    million, peer = 250_000, 1 - rank

    def mix(n: int) -> None:
        comm.all_gather(_floats(3 * n))
        comm.reduce_scatter(_floats(4 * n))
        dist.reduce_scatter_tensor(_floats(n), _floats(2 * n))
        dist.all_reduce(_floats(2 * n))
        dist.broadcast(_floats(n), 0)
        rows = [2 + rank, 1 + 2 * rank], [2 + rank, 1 + 2 * rank]
        rows[1][peer] = [1, 3][rank]
        rows[0][peer] = [3, 1][rank]
        comm.all_to_all(torch.ones(sum(rows[0]), n), *rows)
        comm.exchange({peer: _floats(n * (1 + rank))}, {peer: _floats(n * (2 - rank))}).wait()

    mix(1)  # connects
    counts = []
    with record() as ledger:
        for turn in range(2):
            dist.barrier()
            time.sleep(0.2)  # what is on its way arrives
            counts.append(interface_bytes())
            if turn == 0:
                dist.barrier()
                mix(million)
    interface = (counts[1][0] - counts[0][0], counts[1][1] - counts[0][1])
    return {way: ledger.bytes("context", NETWORK, direction=way) for way in WAYS}, interface


def test_ledger_agrees_with_the_interface(two_nodes: Lab):
    for rank, (ledger, interface) in enumerate(two_nodes(_mix)):
        # In MB: all_gather 3, comm's reduce_scatter 2, gloo's 2, all_reduce 2, broadcast 1 from rank 0; then 3 from
        # rank 0 and 1 from rank 1, and 1 from rank 0 and 2 from rank 1.
        sent = [14_000_000, 12_000_000]
        assert (ledger["sent"], ledger["received"]) == (sent[rank], sent[1 - rank])
        for way, counted in zip(WAYS, interface, strict=True):
            assert 1 <= counted / ledger[way] < 1.03, (rank, way, counted, ledger)


def test_the_lab_shapes_its_links(two_nodes: Lab):
    two_nodes.shell("rate", "100mbit")
    try:
        assert "rate 100Mbit" in two_nodes.shell("run", "0", "tc", "qdisc", "show", "dev", "eth0")
    finally:
        two_nodes.shell("rate", "none")
    lines = [line.split() for line in two_nodes.shell("bytes").splitlines()]
    assert [line[0] for line in lines] == ["0", "1"] and all(len(line) == 3 for line in lines)


def test_the_lab_says_what_it_lacks(tmp_path):
    bash = shutil.which("bash")
    assert bash is not None
    command = [bash, str(SCRIPT), "up", "2"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and "install iproute2" in done.stderr
