"""Replay: known answers of hand-made programs, programs recorded from ranks and from one rank alone."""

import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lsys.parallel.attention import softmax_attention
from lsys.parallel.comm import SequenceComm
from lsys.parallel.gpus import GPUS
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.ledger import NETWORK, NODE, Operation, label, record
from lsys.parallel.linear import linear_attention
from lsys.parallel.replay import (
    Compute,
    Issue,
    Link,
    Program,
    ReplayError,
    SoloComm,
    Wait,
    fastest,
    gather_programs,
    recorded_program,
    simulate,
)

A, B = 1.0, 10.0  # latency, bandwidth
LINKS = {NODE: Link(A, B)}
TWO_LINKS = {NODE: Link(A, B), NETWORK: Link(5.0, 2.0)}


def programs(*steps, nodes=None) -> list[Program]:
    nodes = nodes or [0] * len(steps)
    return [Program(rank, node, tuple(each)) for rank, (each, node) in enumerate(zip(steps, nodes, strict=True))]


def message(kind, key, size, peer, ranks=2) -> Issue:
    return Issue(key, Operation(kind, size, peer), tuple(range(ranks)), "context")


def collective(kind, ranks, size=0, key=0, **more) -> Issue:
    members = tuple(ranks) if not isinstance(ranks, int) else tuple(range(ranks))
    return Issue(key, Operation(kind, size, **more), members, "tensor")


# ---- messages


def test_a_transfer_after_the_work_and_one_behind_it():
    send, receive = message("send", 0, 100, 1), message("recv", 0, 100, 0)
    serial = simulate(programs([send, Wait(0), Compute(8)], [receive, Wait(0), Compute(8)]), LINKS)
    hidden = simulate(programs([send, Compute(8), Wait(0)], [receive, Compute(8), Wait(0)]), LINKS)
    long = simulate(programs([send, Compute(20), Wait(0)], [receive, Compute(20), Wait(0)]), LINKS)
    assert serial.seconds == A + 100 / B + 8 == 19
    assert hidden.seconds == 11 and hidden.exposed() == 3
    assert long.seconds == 20 and long.exposed() == 0 and long.efficiency == 1
    assert serial.exposed("context") == 11 and serial.exposed("tensor") == 0
    for timeline in (hidden, long, serial):
        assert sum(timeline.parts.values()) == pytest.approx(timeline.seconds)
    assert serial.parts["exposed_context"] == 11


def test_waiting_for_a_rank_is_not_waiting_for_a_transfer():
    late = simulate(programs([Compute(5), message("send", 0, 20, 1)], [message("recv", 0, 20, 0), Wait(0)]), LINKS)
    sender, receiver = late.shares
    assert late.seconds == 8
    assert (receiver.waiting, receiver.exposed, receiver.idle) == (5, {"context": 3}, 0)
    assert (sender.compute, sender.waiting, sender.exposed, sender.idle) == (5, 0, {}, 3)
    assert "8.0" in late.table() and f"{5 / 16:.1%}" in late.table()


def test_messages_share_a_port_but_not_those_of_both_directions():
    two = [message("send", 0, 100, 1), message("send", 1, 100, 1)]
    back = [message("recv", 0, 100, 0), message("recv", 1, 100, 0)]
    waits = [Wait(0), Wait(1)]
    assert simulate(programs([*two, *waits], [*back, *waits]), LINKS).seconds == 20 + A
    both = [message("send", 0, 100, 1), message("recv", 1, 100, 1)]
    other = [message("recv", 1, 100, 0), message("send", 0, 100, 0)]
    assert simulate(programs([*both, *waits], [*other, *waits]), LINKS).seconds == 10 + A


def test_a_port_serves_whom_it_can():
    # Rank 0 sends to 1, which is busy with what 2 sends it, and then to 3: the second message does not queue.
    sends = [Compute(1), message("send", 0, 50, 1, 4), message("send", 1, 50, 3, 4), Wait(1), Wait(0)]
    receives = [message("recv", 0, 100, 2, 4), message("recv", 1, 50, 0, 4), Wait(0), Wait(1)]
    other = [message("send", 0, 100, 1, 4), Wait(0)]
    last = [message("recv", 0, 50, 0, 4), Wait(0)]
    timeline = simulate(programs(sends, receives, other, last), LINKS)
    assert timeline.seconds == 10 + 5 + A
    assert timeline.shares[3].idle == 15 + A - (1 + 5 + A)


def test_links_by_node():
    def ends(nodes):
        return programs([message("send", 0, 100, 1), Wait(0)], [message("recv", 0, 100, 0), Wait(0)], nodes=nodes)

    assert simulate(ends([0, 0]), TWO_LINKS).seconds == 11
    assert simulate(ends([0, 1]), TWO_LINKS).seconds == 55
    assert simulate(ends([0, 0]), TWO_LINKS, nodes=[3, 4]).seconds == 55
    # Ports of different links work at the same time.
    first = [message("send", 0, 100, 1, 3), message("send", 1, 20, 2, 3), Wait(0), Wait(1)]
    others = [[message("recv", 0, size, 0, 3), Wait(0)] for size in (100, 20)]
    assert simulate(programs(first, *others, nodes=[0, 0, 1]), TWO_LINKS).seconds == 15


def ring(ranks: int, work: float, size: int) -> list[Program]:
    """Every rank works on a block while it passes it on and gets the next, ranks - 1 times; then on the last."""
    steps = []
    for rank in range(ranks):
        mine: list[Any] = []
        for hop in range(ranks - 1):
            mine += [message("send", 2 * hop, size, (rank + 1) % ranks, ranks)]
            mine += [message("recv", 2 * hop + 1, size, (rank - 1) % ranks, ranks)]
            mine += [Compute(work), Wait(2 * hop), Wait(2 * hop + 1)]
        steps.append([*mine, Compute(work)])
    return programs(*steps)


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_a_ring_pipeline(ranks):
    assert simulate(ring(ranks, 7, 50), LINKS).seconds == 7 * ranks  # transfers of 6 s hide behind 7 s of work
    assert simulate(ring(ranks, 2, 50), LINKS).seconds == 6 * (ranks - 1) + 2


# ---- collectives


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_collectives_cost_what_the_formulas_say(ranks):
    def seconds(kind, size, **more):
        backend = more.pop("backend", "nccl")
        return simulate(
            programs(*[[collective(kind, ranks, size, **more), Wait(0)]] * ranks), LINKS, backend=backend
        ).seconds

    n, hops, rounds = 240, ranks - 1, math.ceil(math.log2(ranks))
    assert seconds("all_gather", n) == pytest.approx(hops * A + hops * n / B)
    assert seconds("reduce_scatter", n) == pytest.approx(hops * A + hops * n / ranks / B)
    assert seconds("all_reduce", n) == pytest.approx(2 * hops * A + 2 * hops * n / ranks / B)
    assert seconds("broadcast", n, peer=1) == pytest.approx(hops * A + n / B)
    assert seconds("reduce", n, peer=1) == pytest.approx(hops * A + n / B)
    assert seconds("gather", n, peer=1) == seconds("scatter", n, peer=1) == pytest.approx(hops * (A + n / B))
    assert seconds("barrier", 0) == rounds * A
    assert seconds("reduce_scatter", n, backend="gloo") == pytest.approx(hops * A + 2 * hops * n / ranks / B)
    assert seconds("broadcast", n, peer=0, backend="gloo") == pytest.approx(rounds * (A + n / B))


def test_all_to_all_takes_what_the_busiest_rank_takes():
    sizes = [[9, 20, 40], [30, 9, 0], [10, 0, 9]]  # from, to; the diagonal stays
    steps = [
        [collective("all_to_all", 3, send=tuple(sizes[r]), receive=tuple(row[r] for row in sizes)), Wait(0)]
        for r in range(3)
    ]
    assert simulate(programs(*steps), LINKS).seconds == 2 * A + 60 / B


def test_a_ring_across_nodes_is_as_slow_as_its_slowest_hop():
    steps = [[collective("all_gather", 4, 10), Wait(0)]] * 4
    timeline = simulate(programs(*steps, nodes=[0, 0, 1, 1]), TWO_LINKS)
    assert timeline.seconds == (1 + 5 + 5) + 3 * 10 / 2  # all four hops but a quick one


def test_groups_do_not_mix_and_nothing_overtakes_a_collective():
    pairs = [[collective("all_gather", pair, 10), Wait(0)] for pair in ((0, 1), (0, 1), (2, 3), (2, 3))]
    assert simulate(programs(*pairs), LINKS).seconds == A + 1
    alone = [[collective("all_reduce", [rank], 1000), Wait(0)] for rank in range(2)]
    assert simulate(programs(*alone), LINKS).seconds == 0
    both = [collective("all_gather", 2, 100, key=1), Wait(1), Wait(0)]
    steps = [[message("send", 0, 50, 1), *both], [message("recv", 0, 50, 0), *both]]
    assert simulate(programs(*steps), LINKS).seconds == 5 + 10 + A


# ---- programs that do not fit


def stuck(*steps) -> str:
    with pytest.raises(ReplayError) as error:
        simulate(programs(*steps), LINKS)
    return str(error.value)


def test_mismatches_are_told():
    wait = Wait(0)
    everyone = stuck([message("send", 0, 10, 1), wait], [message("send", 0, 10, 0), wait])
    assert "for ever" in everyone and "rank 0, step 1: send of 10 bytes: rank 1" in everyone and "rank 1" in everyone
    assert "ranks [1] do not issue it" in stuck([collective("barrier", 2), wait], [])
    assert "no counterpart" in stuck([message("send", 0, 10, 1)], [])
    assert "10 bytes on rank 0, 12 on rank 1" in stuck([message("send", 0, 10, 1)], [message("recv", 0, 12, 0)])
    assert "8 bytes on rank 0, 9 on rank 1" in stuck([collective("all_gather", 2, 8)], [collective("all_gather", 2, 9)])
    assert "all_gather on rank 0 and barrier on rank 1" in stuck(
        [collective("all_gather", 2)], [collective("barrier", 2)]
    )
    roots = [[collective("broadcast", 2, 8, peer=root)] for root in (0, 1)]
    assert "the root is 0 on rank 0, 1 on 1" in stuck(*roots)
    parts = [[collective("all_to_all", 2, send=(0, 3), receive=(0, size))] for size in (3, 4)]
    assert "sends rank 1 3 bytes" in stuck(*parts) or "which expects" in stuck(*parts)
    assert "has not issued" in stuck([wait])
    assert "twice" in stuck([collective("barrier", 1)] * 2)
    assert "unknown" in stuck([message("recv", 0, 10, -1)], [])
    assert "over ranks (0, 5)" in stuck([collective("barrier", [0, 5])])
    assert "over ranks (0, 1)" in stuck([collective("barrier", 2)])  # one more than there are
    assert "rank 1 computes for -1.0 s" in stuck([], [Compute(-1.0)])
    with pytest.raises(ReplayError, match="nodes names 1 ranks; there are 2 programs"):
        simulate(programs([], []), LINKS, nodes=[0])
    with pytest.raises(ReplayError, match="in order"):
        simulate([Program(1, 0, ())], LINKS)
    with pytest.raises(ValueError, match="lack network"):
        simulate(programs([], [], nodes=[0, 1]), LINKS)
    with pytest.raises(ValueError, match="bandwidth above 0"):
        Link(0.0, 0.0)


def test_crossed_waits_are_a_deadlock():
    first = [message("send", 0, 10, 1), Wait(0), message("recv", 1, 10, 1), Wait(1)]
    second = [message("send", 0, 10, 0), Wait(0), message("recv", 1, 10, 0), Wait(1)]
    assert "for ever" in stuck(first, second)


def test_the_fastest_of_several_runs():
    runs = [Program(0, 0, (Compute(a), collective("barrier", 1), Compute(b))) for a, b in ((3.0, 1.0), (2.0, 4.0))]
    assert fastest(runs).steps[::2] == (Compute(2.0), Compute(1.0))
    with pytest.raises(ValueError, match="step 1 is not the same"):
        fastest([runs[0], Program(0, 0, (Compute(1.0), collective("barrier", 2), Compute(1.0)))])


def test_published_hardware_is_in_bounds():
    for links in (gpu.links for gpu in GPUS.values()):
        assert links[NODE].bandwidth > links[NETWORK].bandwidth and links[NODE].latency < links[NETWORK].latency


# ---- programs of real ranks, and of one rank alone


def _burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def _recorded(rank: int, ranks: int):
    label(None, "context", [0, 1])
    with record(programs=True) as ledger:
        _burn(0.05)
        pending = dist.all_reduce(torch.ones(1000), async_op=True)
        _burn(0.1 + 0.1 * rank)
        pending.wait()
        time.sleep(0.3)
        dist.barrier()
    with pytest.raises(ValueError, match="not divided"):
        ledger.take()
    with record() as plain:
        pass
    with pytest.raises(ValueError, match="no program"):
        recorded_program(plain)
    return gather_programs(recorded_program(ledger))


def _gathered(rank, world_size):
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    return [each.rank for each in gather_programs(Program(rank, 0, ()), groups[rank % 2])]


def test_programs_are_of_the_ranks_of_a_group(gloo):
    assert gloo(3, _gathered) == [[0, 2], [1], [0, 2]]


def test_computation_is_cpu_time_between_operations(gloo):
    found = gloo(2, _recorded)
    assert found[0] == found[1] and [program.node for program in found[0]] == [0, 1]
    for rank, program in enumerate(found[0]):
        kinds = [step.operation.kind if isinstance(step, Issue) else type(step) for step in program.steps]
        assert kinds == [Compute, "all_reduce", Compute, Wait, Compute, "barrier", Compute, Wait, Compute]
        seconds = [step.seconds for step in program.steps if isinstance(step, Compute)]
        assert 0.05 <= seconds[0] < 0.09 and 0.1 + 0.1 * rank <= seconds[1] < 0.14 + 0.1 * rank
        assert sum(seconds[2:]) < 0.05  # sleeping is no computation
    timeline = simulate(found[0], {NODE: Link(0, 1e9), NETWORK: Link(1e-3, 1e6)}, backend="gloo")
    assert 0.25 < timeline.seconds < 0.35
    assert 0.08 < timeline.shares[0].waiting < 0.12  # rank 0 comes to the barrier 0.1 s before rank 1


LENGTHS = (37, 1, 0, 90, 5)


def _cases(comm: SequenceComm):
    """Attention and linear attention, forward and backward, by every way to communicate that a comm has."""
    torch.manual_seed(0)
    layout = SequenceLayout.contiguous(LENGTHS, comm.size)
    q, k, v = (torch.randn(layout.tokens(comm.rank), 4, 8, requires_grad=True) for _ in range(3))
    for method in ("ring", "gather", "ulysses"):
        softmax_attention(q, k, v, layout, comm, method=method).sum().backward()
    linear_attention(q, k, v, layout, comm, method="lasp2")[0].sum().backward()
    rows = torch.ones(comm.size * 3, 2)
    comm.all_gather(rows[: 3 + comm.rank], [3 + rank for rank in range(comm.size)])
    uneven = [20, *[1] * (comm.size - 1)]
    comm.all_gather_async(torch.ones(uneven[comm.rank], 2), uneven, exact=True).wait()
    comm.reduce_scatter(rows)
    comm.reduce_scatter(torch.ones(sum(uneven), 2), uneven)
    comm.all_gather(torch.ones(0, 2))


def _operations(program: Program) -> list:
    return [
        step if not isinstance(step, Issue) else step.operation
        for step in program.steps
        if not isinstance(step, Compute)
    ]


def _real(rank: int, ranks: int):
    comm = SequenceComm(None)
    _cases(comm)
    with record(programs=True) as ledger:
        _cases(comm)
    return recorded_program(ledger)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_alone_has_the_program_of_a_rank_among_others(gloo, ranks):
    alone = []
    for rank, real in enumerate(gloo(ranks, _real)):
        comm = SoloComm(rank, ranks, backend="gloo")
        _cases(comm)
        comm.restart()
        _cases(comm)
        alone.append(comm.program)
        assert _operations(alone[-1]) == _operations(real)
    timeline = simulate(alone, {NODE: Link(1e-5, 1e9)}, backend="gloo")
    assert timeline.seconds >= max(share.compute for share in timeline.shares) > 0
    for share in timeline.shares:
        parts = share.compute + sum(share.exposed.values()) + share.waiting + share.idle
        assert parts == pytest.approx(timeline.seconds)


def test_rank_alone_receives_zeros():
    comm = SoloComm(1, 3, [0, 0, 1])
    assert comm.all_gather(torch.ones(2, 2)).eq(0).all() and comm.all_to_all(torch.ones(3, 2)).shape == (3, 2)
    assert comm.reduce_scatter(torch.ones(6, 2)).shape == (2, 2)
    buffer = torch.ones(4)
    assert comm.exchange({0: torch.ones(4)}, {2: buffer}).wait()[2] is buffer and buffer.eq(0).all()
    kinds = [step.operation.kind for step in comm.program.steps if isinstance(step, Issue)]
    assert kinds == ["all_gather", "all_to_all", "reduce_scatter", "recv", "send"]
    with pytest.raises(ValueError, match="not among the 3 ranks"):
        SoloComm(3, 3)


@pytest.mark.parametrize("ranks, method", [(16, "ring"), (64, "gather"), (64, "ulysses")])
def test_many_ranks_on_one_core(ranks, method):
    """All ranks' attention, one after the other, eight to a node."""
    nodes = [rank // 8 for rank in range(ranks)]
    layout = SequenceLayout.zigzag([64 * 16, 100], ranks)
    found = []
    for rank in range(ranks):
        comm = SoloComm(rank, ranks, nodes)
        q, k, v = (torch.zeros(layout.tokens(rank), 64, 4, requires_grad=True) for _ in range(3))
        softmax_attention(q, k[:, :2], v[:, :2], layout, comm, method=method).sum().backward()
        found.append(comm.program)
    timeline = simulate(found, GPUS["H100"].links)
    assert 0 < timeline.efficiency <= 1 and set(timeline.shares[5].exposed) <= {"context"}
