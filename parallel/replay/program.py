"""What a rank does, as far as its time is concerned: computation, and the issue of and the wait for operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from lsys.parallel.ledger import Ledger, Operation


@dataclass(frozen=True, slots=True)
class Compute:
    """Seconds of computation."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Issue:
    """An operation begins.

    Attributes:
        key: what `Wait` calls it; a number that the program uses once.
        operation: kind and size; its peer is a number in `ranks`.
        ranks: of its group, in group order, as the programs are numbered.
        axis: of the mesh; groups of the same ranks but another axis are other groups.
    """

    key: int
    operation: Operation
    ranks: tuple[int, ...]
    axis: str


@dataclass(frozen=True, slots=True)
class Wait:
    """The rank goes on when the operation has ended."""

    key: int


Step = Compute | Issue | Wait


@dataclass(frozen=True, slots=True)
class Program:
    """All steps of one rank, in order. node: which node it is on."""

    rank: int
    node: int
    steps: tuple[Step, ...]


def recorded_program(ledger: Ledger) -> Program:
    """This rank's program, from a ledger that was recorded with `record(programs=True)` and is closed.

    Computation is the CPU time of each thread between its operations: ranks that share a core do not count each other's
    work, nor waiting, nor sleep. What a thread did before its first operation counts only for the thread that recorded.

    Raises:
        ValueError: the ledger has no programs, or is still recording.
    """
    trace = ledger.trace
    if not trace or trace[-1].call is not None or len(trace) < 2:
        raise ValueError("the ledger has no program: use record(programs=True), and read it after the context")
    keys: dict[int, int] = {}
    steps: list[Step] = []
    left = {trace[0].thread: trace[0].after}  # CPU time of each thread when it last left an operation
    node = 0
    for call, is_wait, thread, before, after in trace[1:]:
        steps.append(Compute(max(0.0, before - left.get(thread, before))))
        left[thread] = after
        if call is None:
            continue
        if is_wait:
            steps.append(Wait(keys[id(call)]))
        else:
            keys[id(call)] = len(keys)
            node = call.place.nodes[call.place.rank]
            steps.append(Issue(keys[id(call)], call.operation, call.place.ranks, call.place.axis))
    return Program(dist.get_rank(), node, tuple(steps))


def fastest(runs: Sequence[Program]) -> Program:
    """The same program from several runs, with the least time of each computation: what else the machine did goes.

    Raises:
        ValueError: the runs differ in more than their times.
    """
    steps: list[Step] = []
    for number, same in enumerate(zip(*(run.steps for run in runs), strict=True)):
        computed = [step.seconds for step in same if isinstance(step, Compute)]
        if len(computed) != len(runs) and len(set(same)) > 1:
            raise ValueError(f"step {number} is not the same in all runs: {set(same)}")
        steps.append(Compute(min(computed)) if computed else same[0])
    return Program(runs[0].rank, runs[0].node, tuple(steps))


def gather_programs(program: Program, group: dist.ProcessGroup | None = None) -> list[Program]:
    """The programs of all ranks of the group, in order of their ranks; all of them call it together."""
    programs: list[Program | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(programs, program, group=group)
    return sorted((each for each in programs if each is not None), key=lambda each: each.rank)
