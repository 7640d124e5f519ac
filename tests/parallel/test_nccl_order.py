"""No method waits for ever on NCCL, which runs each rank's operations in the order of issue (`support.nccl_order`).

The queues are what the code itself issues, forward and backward, each rank run by itself. Programs that end one by one also
end one after the other, as the layers of a model are; layers side by side, whose operations mix, are cases of their own.
"""

import ast
import random
from collections import Counter

import pytest
import torch
from support.nccl_cases import COLLECTIVES_ONLY, METHODS, OPERATIONS, SEED, cases
from support.nccl_order import BATCH, ROOT, AloneComm, Group, queues_of, stuck

from lsys.parallel import methods
from lsys.parallel.methods import SOFTMAX, STATE, Method


@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_ranks_come_to_the_end(operation):
    for case, queues in cases(operation):
        assert stuck(queues) == {}, case


def _kinds(operation: str) -> Counter[str]:
    """In how many cases of an operation any rank issues a group of each kind."""
    every = [{group.kind for queue in queues for group in queue} for _, queues in cases(operation)]
    return Counter(kind for kinds in every for kind in kinds)


def test_hundreds_of_cases_send_from_rank_to_rank():
    assert sum(OPERATIONS.values()) >= 300
    assert sum(_kinds(operation)[BATCH] for operation in OPERATIONS) >= 200


# ---- nothing is left out


def test_every_method_of_the_registry_is_run():
    def is_registry(value: object) -> bool:
        return isinstance(value, dict) and any(isinstance(each, Method) for each in value.values())

    assert {name for name, value in vars(methods).items() if is_registry(value)} == {"SOFTMAX", "STATE"}
    assert len(METHODS) == len(SOFTMAX) + len(STATE)
    kinds = {name: _kinds(name) for name in METHODS}
    assert all(kinds.values()), "of some method no case issues anything"
    assert {name for name in METHODS if not kinds[name][BATCH]} == COLLECTIVES_ONLY


def _called(tree: ast.AST, function: str = "") -> set[str]:
    """Functions that ask a comm for messages between two ranks: by `exchange`, or by an `exact` gather."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).split(".")[-1]
            exact = node.func.attr == "all_gather_async" and any(each.arg == "exact" for each in node.keywords)
            if owner == "comm" and (exact or node.func.attr == "exchange"):
                found.add(function)
        inside = node.name if isinstance(node, ast.FunctionDef) else function
        found |= _called(node, inside)
    return found


def test_every_caller_of_the_comm_is_run():
    """Also that nobody sends past the comm, where these queues would not have it."""
    paths = [path for folder in ("lsys", "parallel", "kernels") for path in (ROOT / folder).rglob("*.py")]
    texts = {path.resolve().relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    direct = {name for name, text in texts.items() if any(each in text for each in ("P2POp", ".isend(", ".irecv("))}
    assert direct == {"parallel/comm.py"}
    static = {
        f"{name} {function}" for name, text in texts.items() if "comm." in text for function in _called(ast.parse(text))
    }
    seen = {
        group.issuer
        for operation in OPERATIONS
        for _, queues in cases(operation)
        for queue in queues
        for group in queue
        if group.kind == BATCH
    }
    # Measures links from host to host, for which NCCL does nothing.
    measuring = {"lsys/bench/link_speeds.py _seconds"}
    assert static - measuring == seen


# ---- the comm by itself


def _drawn_sizes(draw: random.Random, ranks: int) -> list[int]:
    kind = draw.choice(("zero", "equal", "nearly", "uneven"))
    if kind == "zero":
        return [0] * ranks
    return [{"equal": 8, "nearly": 8 - (rank == 0)}.get(kind, draw.choice((0, 1, 9))) for rank in range(ranks)]


def test_ranks_issue_the_same_collectives_whatever_the_sizes():
    """On tensors that are not of the CPU, where a comm reduces as on NCCL."""
    seen: set[str] = set()
    for number in range(60):
        draw = random.Random(f"{SEED} {number}")
        ranks = 2 + number % 7
        rows = [
            (draw.choice(("gather", "exact", "scatter", "all to all")), _drawn_sizes(draw, ranks)) for _ in range(6)
        ]

        def program(comm: AloneComm) -> None:
            for call, sizes in rows:
                mine, whole = torch.empty(sizes[comm.rank], 2, device="meta"), torch.empty(sum(sizes), 2, device="meta")
                if call == "scatter":
                    comm.reduce_scatter(whole, sizes)
                elif call == "all to all":
                    comm.all_to_all(whole, sizes, [sizes[comm.rank]] * comm.size)
                else:
                    comm.all_gather_async(mine, sizes, exact=call == "exact").wait()

        queues = queues_of([0] * ranks, program)
        assert stuck(queues) == {}, rows
        seen |= {group.kind for queue in queues for group in queue}
    assert seen == {BATCH, "all_gather", "reduce_scatter", "all_to_all"}


# ---- that the simulator finds what is wrong


def _differ(one: Group, other: Group) -> bool:
    """Whether two groups of a rank exchange other bytes with a peer of both."""
    return any(
        (one.sends.get(peer), one.receives.get(peer)) != (other.sends.get(peer), other.receives.get(peer))
        for peer in one.peers & other.peers
    )


@pytest.mark.parametrize("operation", ["softmax ring", "softmax usp", "state lasp1", "state zeco", "side by side"])
def test_two_neighbours_swapped_on_one_rank_stick(operation):
    """Of each rank of each case the first two that differ for a peer; others may stand in any order, or be alike in bytes."""
    swapped = 0
    for case, queues in cases(operation):
        for rank, queue in enumerate(queues):
            places = (place for place in range(len(queue) - 1) if _differ(queue[place], queue[place + 1]))
            if (place := next(places, None)) is None:
                continue
            changed = [*queue[:place], queue[place + 1], queue[place], *queue[place + 2 :]]
            assert rank in stuck([*queues[:rank], changed, *queues[rank + 1 :]]), (case, rank, place)
            swapped += 1
    assert swapped >= 40


def _batch(sends: dict[int, int], receives: dict[int, int]) -> Group:
    return Group(BATCH, sends, receives)


def _gather(rank: int, ranks: int, size: int = 8) -> Group:
    others = {peer: size for peer in range(ranks) if peer != rank}
    return Group("all_gather", others, others)


def test_a_program_by_hand_that_ends():
    """Around a ring of three, messages of two sizes, then a collective; a fourth rank has but that, a fifth nothing."""
    ring = [[_batch({(r + 1) % 3: n + r}, {(r - 1) % 3: n + (r - 1) % 3}) for n in (10, 20)] for r in range(3)]
    queues = [[*ring[rank], _gather(rank, 4)] for rank in range(3)]
    assert stuck([*queues, [_gather(3, 4)], []]) == {}
    assert stuck([]) == {}


def test_a_program_by_hand_that_waits_in_a_circle():
    """Each of three sends to the next before it receives; in one batch they would end."""
    sends = [_batch({(rank + 1) % 3: 8}, {}) for rank in range(3)]
    receives = [_batch({}, {(rank - 1) % 3: 8}) for rank in range(3)]
    assert stuck([[*each] for each in zip(sends, receives, strict=True)]) == dict(enumerate(sends))
    together = [[_batch(dict(a.sends), dict(b.receives))] for a, b in zip(sends, receives, strict=True)]
    assert stuck(together) == {}


def test_a_program_by_hand_with_a_collective_out_of_order():
    """The third rank, which has the collective alone, waits as well; so do ranks whose messages differ in bytes."""
    there, back = _batch({1: 8}, {1: 4}), _batch({0: 4}, {0: 8})
    gathers = [_gather(rank, 3) for rank in range(3)]
    assert stuck([[there, gathers[0]], [back, gathers[1]], [gathers[2]]]) == {}
    assert set(stuck([[there, gathers[0]], [gathers[1], back], [gathers[2]]])) == {0, 1, 2}
    assert set(stuck([[there], [_batch({0: 5}, {0: 8})]])) == {0, 1}
    assert set(stuck([[gathers[0]], [gathers[1]], []])) == {0, 1}
