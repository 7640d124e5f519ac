"""One point of a scaling sweep: a short run, and the replay of one of its steps. Started by `lsys bench scaling`."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tyro.conf import Positional

from lsys.bench.link_speeds import measured_links
from lsys.config.load import load
from lsys.config.overrides import parse
from lsys.parallel.comm import SequenceComm
from lsys.parallel.ledger import WORLD, record
from lsys.parallel.replay import Links, Timeline, fastest, gather_programs, recorded_program, simulate
from lsys.train.run import Run, open_run


@dataclass(frozen=True)
class PointOptions:
    """Run one point of a scaling sweep."""

    config: Positional[Path]
    """YAML file of the run."""
    replays: int = 3
    """How often the step is recorded for replay; the least time of each computation counts."""


def main() -> None:
    options, overrides = parse(PointOptions, sys.argv[1:], prog="lsys.bench.point")
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
    runs = []
    for _ in range(repeats):
        dist.barrier()
        with record(programs=True) as ledger:
            run.engine.forward_backward(batches)
            run.engine.step()
        runs.append(gather_programs(recorded_program(ledger)))
    timeline = simulate([fastest(same) for same in zip(*runs, strict=True)], links, backend="gloo")
    return timeline, run.data.flops_of_all(flops) / dist.get_world_size()


def _summary(timeline: Timeline, links: Links) -> dict[str, Any]:
    return {
        "step_seconds": timeline.seconds,
        "parts": timeline.parts,
        "links": {name: asdict(link) for name, link in links.items()},
    }


if __name__ == "__main__":
    main()
