"""A training run in which one rank is slow: what the monitoring page shows of it. For the launcher:

    make train   # prepares the corpus
    LAB=demo launch/lab.sh up 2 100mbit
    LAB=demo RANKS=2 launch/lab.sh torchrun /tmp/logs bench/straggler.py configs/quickstart.yaml --rank 2 --ms 30 --parallel.context 2
    LAB=demo launch/lab.sh down

Two nodes of two ranks behind links of 100 Mbit/s; rank 2 sleeps 30 ms in the forward pass of every layer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import time

from lsys.config.load import load
from lsys.config.overrides import parse_overrides
from lsys.observe.profiler import named
from lsys.train.run import open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--rank", type=int, default=1, help="which rank is slow")
    parser.add_argument("--ms", type=float, default=30.0, help="how much longer each of its layers takes, forward")
    options, others = parser.parse_known_args()
    with open_run(load(options.config, parse_overrides(others))) as run:
        if run.groups.launch.rank == options.rank:
            for chunk in run.engine.chunks:
                for name, module in named(chunk):
                    if name.endswith("MLP"):
                        module.register_forward_pre_hook(lambda *_: time.sleep(options.ms / 1e3))
        run.train()


if __name__ == "__main__":
    main()
