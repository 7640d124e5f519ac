"""What operations move, by what is true of every algorithm for them: what one rank sends another receives, and no rank lacks what it is to have."""

from collections import Counter

import pytest

from lsys.parallel.traffic import Operation, Traffic, traffic

N = 720  # bytes, which parts of 2 to 6 ranks divide


def of_all(operation: Operation, ranks: int, backend: str) -> list[Traffic]:
    """Of each rank; what is sent has to be what is received."""
    found = [traffic(operation, rank, ranks, backend) for rank in range(ranks)]
    for rank, mine in enumerate(found):
        assert rank not in mine.sent and rank not in mine.received
        for peer in range(ranks):
            assert mine.sent.get(peer) == found[peer].received.get(rank)
    return found


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 6])
def test_rings(ranks: int, backend: str) -> None:
    rounds = {"all_gather": N * (ranks - 1), "all_reduce": 2 * N * (ranks - 1) // ranks}
    rounds["reduce_scatter"] = N * (ranks - 1) // ranks * (2 if backend == "gloo" else 1)
    for kind, size in rounds.items():
        for rank, moved in enumerate(of_all(Operation(kind, N), ranks, backend)):
            assert moved.sent == ({(rank + 1) % ranks: size} if ranks > 1 else {})


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("ranks", [2, 3, 5, 6])
def test_operations_with_a_root(ranks: int, backend: str) -> None:
    for root in range(ranks):
        for kind in ("broadcast", "scatter"):
            found = of_all(Operation(kind, N, root), ranks, backend)
            assert [sum(each.received.values()) for each in found] == [N * (rank != root) for rank in range(ranks)]
        scattered = of_all(Operation("scatter", N, root), ranks, backend)
        assert Counter(scattered[root].sent) == dict.fromkeys(set(range(ranks)) - {root}, N)
        gathered = of_all(Operation("gather", N, root), ranks, backend)
        assert [sum(each.sent.values()) for each in gathered] == [N * (rank != root) for rank in range(ranks)]
        assert len(gathered[root].received) == ranks - 1
        reduced = of_all(Operation("reduce", N, root), ranks, backend)
        assert sum(reduced[root].received.values()) >= N
        if backend == "nccl":  # a chain: each rank but the root sends its sum once
            assert [sum(each.sent.values()) for each in reduced] == [N * (rank != root) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_rest(ranks: int) -> None:
    assert all(not any(each.sent.values()) and each.sent for each in of_all(Operation("barrier"), ranks, "gloo"))
    parts = [tuple(10 * a + b + 1 for b in range(ranks)) for a in range(ranks)]
    for rank in range(ranks):
        taken = tuple(parts[other][rank] for other in range(ranks))
        moved = traffic(Operation("all_to_all", send=parts[rank], receive=taken), rank, ranks, "nccl")
        assert moved.sent == {peer: parts[rank][peer] for peer in range(ranks) if peer != rank}
        assert moved.received == {peer: parts[peer][rank] for peer in range(ranks) if peer != rank}
    assert traffic(Operation("send", N, 1), 0, ranks, "gloo") == Traffic({1: N}, {})
    assert traffic(Operation("recv", N, 0), 1, ranks, "gloo") == Traffic({}, {0: N})
    assert traffic(Operation("send", N, 0), 0, ranks, "gloo") == Traffic({}, {})
    with pytest.raises(ValueError, match="'shout' is no operation of a process group that is known here"):
        traffic(Operation("shout"), 0, ranks, "gloo")
