"""A cluster of network namespaces (launch/lab.sh) for tests: one rank of a gloo group on each node."""

import contextlib
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lsys.bench import lab as bench
from lsys.bench.lab import LabUnavailable as LabUnavailable

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "lab.sh"


class Lab(bench.Lab):
    """A lab that is up; `lab(fn, *args)` runs fn(rank, world_size, *args) on every node and gives the results by rank.

    `fn` is a function at the top level of a file; arguments and results are pickled.
    """

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}

    def __call__(self, fn: Callable[..., Any], *args: Any, timeout: float = 100) -> list[Any]:
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            call = (fn.__code__.co_filename, fn.__name__, args, self.nodes)
            (folder / "call").write_bytes(pickle.dumps(call))
            ranks = [
                stack.enter_context(
                    subprocess.Popen(
                        [SCRIPT, "run", str(rank), sys.executable, __file__, name, str(rank)],
                        env=self.environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
                for rank in range(self.nodes)
            ]
            try:
                outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
            finally:
                for rank in ranks:
                    rank.kill()
            failed = [output for rank, output in zip(ranks, outputs, strict=True) if rank.returncode]
            if failed:
                raise AssertionError("\n".join(failed))
            return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(self.nodes)]


@contextlib.contextmanager
def lab(nodes: int, rate: str = "none") -> Iterator[Lab]:
    """A lab of so many nodes, its links shaped to `rate`, as "100mbit".

    Raises:
        LabUnavailable: no root, no iproute2, or no network namespaces here.
    """
    with bench.lab(nodes, rate, name=f"lsys-test-{os.getpid()}") as made:
        yield Lab(made.name, made.nodes)


def interface_bytes() -> tuple[int, int]:
    """Sent and received by this node's interface so far."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:"))
    fields = line.split(":")[1].split()
    return int(fields[8]), int(fields[0])


def _serve(folder: Path, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    file, name, args, nodes = pickle.loads((folder / "call").read_bytes())
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), nodes), rank=rank, world_size=nodes)
    result = runpy.run_path(file)[name](rank, nodes, *args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
