"""One rank of `bench/checkpoint.py`: saves and loads one engine's state by lsys and by torch, under torchrun.

torchrun --standalone --nproc-per-node 2 bench/workers/checkpoint.py CASES.json RESULTS.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it finds lsys and bench here

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from bench.common.tools import serve
from bench.common.tree import ROOT
from lsys.checkpoint import Checkpoints, Cursor
from lsys.config.load import dump, load
from lsys.config.overrides import parse_overrides
from lsys.runtime.environment import launch_from_environment
from lsys.runtime.groups import Groups, process_groups


@dataclass(frozen=True)
class Case:
    """One measurement: options of the quickstart's configuration, how often, and the folder, which is removed."""

    options: tuple[str, ...]
    repeats: int
    folder: str


def measure(case: Case) -> dict[str, Any]:
    """Bytes of a checkpoint and of this rank's shard; seconds, CPU seconds and memory beyond what there was (each the most of any rank)"""
    settings = load(ROOT / "configs" / "quickstart.yaml", parse_overrides(list(case.options)))
    folder = Path(case.folder)
    with process_groups(settings.parallel, launch_from_environment()) as groups:
        engine = engine_of(settings, groups)
        checkpoints, cursor = Checkpoints(folder / "lsys", 1), Cursor(1, 1, dump(settings))
        ours, theirs = folder / "lsys" / "step-00000001", folder / "torch"
        ways: dict[str, Callable[[], Any]] = {
            "lsys save": lambda: checkpoints.save(engine, cursor),
            "torch save": lambda: dcp.save(tensors, storage_writer=dcp.FileSystemWriter(theirs)),
            "lsys load": lambda: checkpoints.load(engine, ours),
            "torch load": lambda: dcp.load(tensors, storage_reader=dcp.FileSystemReader(theirs)),
        }
        seen: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
        for _ in range(case.repeats):
            dist.barrier()
            if groups.launch.rank == 0:  # a file system's time to free what was there before is not counted
                shutil.rmtree(folder, ignore_errors=True)
            dist.barrier()
            for way, run in ways.items():
                tensors = theirs_of(engine, loading=way.endswith("load")) if way.startswith("torch") else {}
                seen[way].append(watched(run))
        written = {"lsys": size(ours), "torch": size(theirs)}
        dist.barrier()
        if groups.launch.rank == 0:
            shutil.rmtree(folder)
        return {"shard": shard(engine), "bytes": written, "seen": seen}


def engine_of(settings: Any, groups: Groups) -> Any:
    """An engine whose optimizer has states, drawn, without a step."""
    from lsys.train.engine import Engine

    engine = Engine(settings, groups)
    engine.state(loading=True)  # makes them
    generator = torch.Generator().manual_seed(groups.launch.rank)
    for each in engine.optimizer.chained_optimizers:
        for state in each.optimizer.state.values():
            state["exp_avg"].normal_(generator=generator)
            state["exp_avg_sq"].uniform_(generator=generator)
            state["step"] = torch.tensor(1.0)
    return engine


def theirs_of(engine: Any, loading: bool) -> dict[str, Any]:
    """The tensors that lsys saves or loads, each rank's own, as torch's distributed checkpoint takes them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist

    from lsys.checkpoint.storage import share_work

    tensors, _ = save_preprocess(engine.state(loading=loading))
    if not loading:
        share_work(tensors, engine.groups.collection.dp_cp)
    only = dict(enumerate(each for each in nested_values(tensors) if isinstance(each, ShardedTensor)))
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(only, keep_only_main_replica=not loading)
    return torch_dist.mcore_to_pyt_state_dict(by_key, is_loading=loading)


def shard(engine: Any) -> int:
    """Bytes of what this rank holds: the model's slice and its own part of the optimizer's states, memory that both share counted once."""
    held = [each for chunk in engine.chunks for each in (*chunk.module.parameters(), *chunk.module.buffers())]
    model = {tensor.untyped_storage().data_ptr() for tensor in held}
    total = sum(tensor.nbytes for tensor in held)
    for each in engine.optimizer.chained_optimizers:
        for parameter, state in each.optimizer.state.items():
            own = [
                tensor for tensor in (parameter, *state.values()) if tensor.untyped_storage().data_ptr() not in model
            ]
            total += sum(tensor.nbytes for tensor in own)
    return total


def watched(run: Callable[[], Any]) -> tuple[float, float, int]:
    """(seconds, CPU seconds, bytes of memory at the most, beyond those before): the most of all ranks."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    dist.barrier()
    start, work = time.perf_counter(), time.process_time()
    run()
    seconds, work = time.perf_counter() - start, time.process_time() - work
    found = torch.tensor([seconds, work, resident("VmHWM") - before], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found[0]), float(found[1]), int(found[2])


def resident(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    serve(Case, measure)
