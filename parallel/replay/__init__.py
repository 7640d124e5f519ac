"""Replay: the time that recorded programs would take if each rank had a device of its own, and given links.

On a machine with fewer cores than ranks, wall-clock says little about overlap and balance: a rank that waits lends its
core to another. Here, each rank's computation is measured in CPU time of its thread, and everything else is simulated.
Programs come from a run of all ranks:

    with record(programs=True) as ledger:
        train_step()
    programs = gather_programs(recorded_program(ledger))

or, for more ranks than a machine can run, from one rank after the other, alone:

    comms = [SoloComm(rank, 64, nodes) for rank in range(64)]
    for comm in comms:
        softmax_attention(q, k, v, layout, comm)  # that rank's part
    programs = [comm.program for comm in comms]

and `simulate(programs, GPUS["H100"].links)` gives their timeline.
"""

from lsys.parallel.links import Link, Links
from lsys.parallel.replay.program import (
    Compute,
    Issue,
    Program,
    Step,
    Wait,
    fastest,
    gather_programs,
    recorded_program,
)
from lsys.parallel.replay.simulate import ReplayError, simulate
from lsys.parallel.replay.solo import SoloComm
from lsys.parallel.replay.timeline import Share, Timeline

__all__ = [
    "Compute",
    "Issue",
    "Link",
    "Links",
    "Program",
    "ReplayError",
    "Share",
    "SoloComm",
    "Step",
    "Timeline",
    "Wait",
    "fastest",
    "gather_programs",
    "recorded_program",
    "simulate",
]
