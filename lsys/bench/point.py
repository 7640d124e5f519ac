"""One point of a scaling sweep: a short run, and the replay of one of its steps. Started by `lsys bench scaling`."""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tyro.conf import Positional

from lsys.config.load import load
from lsys.config.overrides import parse
from lsys.parallel.comm import SequenceComm
from lsys.parallel.ledger import NETWORK, NODE, WORLD, record
from lsys.parallel.replay import Link, Links, Timeline, fastest, gather_programs, recorded_program, simulate
from lsys.train.run import Run, open_run

LARGE = 2**20  # fp32 numbers of a long message


@dataclass(frozen=True)
class PointOptions:
    """Run one point of a scaling sweep."""

    config: Positional[Path]
    """YAML file of the run."""
    replays: int = 3
    """How often the step is recorded for replay; the least time of each computation counts."""


def main(words: list[str] | None = None) -> None:
    options, overrides = parse(PointOptions, sys.argv[1:] if words is None else words, prog="lsys.bench.point")
    with open_run(load(options.config, overrides)) as run:
        run.train()
        if run.groups.device.type == "cpu" and options.replays:
            links = measured_links(SequenceComm(None, axis=WORLD, node_of_rank=run.groups.nodes))
            timeline, flops = replayed(run, links, options.replays)
            if run.groups.launch.rank == 0:
                summary = _summary(timeline, links) | {"flops": flops / timeline.seconds}
                (run.settings.train.folder / "replay.json").write_text(json.dumps(summary, indent=1) + "\n")


def replayed(run: Run, links: Links, repeats: int) -> tuple[Timeline, float]:
    """One step as it would be if each rank had a processor of its own, over these links; and a rank's model FLOPs of it."""
    batches, flops = run.data.training(0)
    total = torch.tensor(flops, dtype=torch.float64)  # of a data replica, alike on its ranks
    dist.all_reduce(total)
    share = run.groups.data_size / dist.get_world_size()
    runs = []
    for _ in range(repeats):
        dist.barrier()
        with record(programs=True) as ledger:
            run.engine.forward_backward(batches)
            run.engine.step()
        runs.append(gather_programs(recorded_program(ledger)))
    timeline = simulate([fastest(same) for same in zip(*runs, strict=True)], links, backend="gloo")
    return timeline, float(total) * share / dist.get_world_size()


def _summary(timeline: Timeline, links: Links) -> dict[str, Any]:
    ranks = len(timeline.shares)
    axes = sorted({axis for share in timeline.shares for axis in share.exposed})
    parts = {
        "compute": sum(share.compute for share in timeline.shares) / ranks,
        **{f"exposed_{axis}": sum(share.exposed.get(axis, 0.0) for share in timeline.shares) / ranks for axis in axes},
        "waiting": sum(share.waiting + share.idle for share in timeline.shares) / ranks,
    }
    return {
        "step_seconds": timeline.seconds,
        "parts": parts,
        "links": {name: asdict(link) for name, link in links.items()},
    }


def measured_links(comm: SequenceComm) -> dict[str, Link]:
    """What messages between two ranks take, in both directions at once: of rank 0 with its first peer of each link class."""
    nodes, found = comm.node_of_rank, {}
    for name, is_peer in ((NODE, lambda node: node == nodes[0]), (NETWORK, lambda node: node != nodes[0])):
        peer = next((rank for rank in range(1, comm.size) if is_peer(nodes[rank])), None)
        if peer is not None:
            found[name] = _measured_link(comm, peer)
    return found


def _measured_link(comm: SequenceComm, peer: int) -> Link:
    """All ranks call it together; those but 0 and `peer` wait."""
    small = _seconds(comm, peer, 1, 100)
    large = _seconds(comm, peer, LARGE, 5)
    both = torch.tensor([small, max(large - small, 1e-9)], dtype=torch.float64)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return Link(float(both[0]), 4 * LARGE / float(both[1]))


def _seconds(comm: SequenceComm, peer: int, numbers: int, repeats: int) -> float:
    """Median time of an exchange; 0 on ranks that have no part."""
    ends, times = {0: peer, peer: 0}, [0.0]
    tensors = torch.ones(2, numbers)
    dist.barrier()
    if comm.rank in ends:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            comm.exchange({ends[comm.rank]: tensors[0]}, {ends[comm.rank]: tensors[1]}).wait()
            times.append(time.perf_counter() - began)
    dist.barrier()
    return statistics.median(times)


if __name__ == "__main__":
    main()
