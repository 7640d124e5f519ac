"""What the ledger and the waterfall cost, and how replay compares with wall-clock, on two ranks.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 bench/ledger.py overhead --parallel.context 2
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 bench/ledger.py replay

overhead: training steps of configs/quickstart.yaml (`make train` prepares its corpus), without a recorder, with the ledger,
and with ledger and waterfall in turn, in one run; any --parallel.NAME. replay: exchanges, attention and training steps, measured, and replayed from their
programs over links that are measured in the same run. The latter also in a lab of two nodes:

    launch/lab.sh up 2 1gbit; launch/lab.sh torchrun /tmp/logs bench/ledger.py replay; launch/lab.sh down
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist

from lsys.bench.link_speeds import LARGE, measured_link
from lsys.config.load import load
from lsys.config.overrides import parse_overrides
from lsys.config.schema import Config
from lsys.data.corpus import Corpus
from lsys.data.plan import Planner
from lsys.data.stream import TokenStream
from lsys.observe.waterfall_recorder import Recorder
from lsys.parallel.attention import softmax_attention
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.ledger import NETWORK, NODE, record
from lsys.parallel.replay import Link, fastest, gather_programs, recorded_program, simulate
from lsys.runtime.environment import launch_from_environment
from lsys.runtime.groups import Groups, process_groups


@contextlib.contextmanager
def training(settings: Config) -> Iterator[tuple[Callable[[int], None], Groups]]:
    """A function that runs the training step of a number, and the ranks."""
    corpora = [Corpus.open(str(corpus.path)) for corpus in settings.data.corpora]
    stream = TokenStream(corpora, [1.0] * len(corpora), seed=0, split="train", validation_fraction=0.01)
    parallel, train = settings.parallel, settings.train
    planner = Planner(stream, train.batch_tokens, train.micro_batch_tokens, parallel.context, parallel.tensor)
    with process_groups(parallel, launch_from_environment()) as groups:
        from lsys.train.engine import Engine  # imports megatron, which `process_groups` prepares

        engine = Engine(settings, groups)

        def step(number: int) -> None:
            engine.forward_backward(batches(planner, number, groups))
            engine.step()

        yield step, groups


def batches(planner: Planner, number: int, groups: Groups):
    plan = planner.step(number, groups.data_rank, groups.data_size)
    return plan.on_rank(groups.context_rank, groups.device, groups.context)


MODES = ("off", "ledger", "ledger and waterfall")


def overhead(settings: Config, turns: int) -> None:
    """Turns of the same step in each mode, of which each comes first, second and third in turn."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    cpu = dict.fromkeys(MODES, 0.0)
    own: list[float] = []  # CPU s of summing up a recorded step, or of seeing that there is none
    reports: list[float] = []  # s
    calls = 0
    with training(settings) as (step, groups):
        recorder = Recorder(groups, every=2)  # steps that are called 2 are recorded, those called 1 are not
        for number in range(3):
            step(number)
        with recorder.recording(1):
            for number in range(turns):
                for mode in MODES[number % 3 :] + MODES[: number % 3]:
                    with contextlib.nullcontext() if mode == "off" else record() as ledger:
                        dist.barrier()
                        recorder.end_step(1 if mode == MODES[2] else 0)
                        began, used = time.perf_counter(), time.process_time()
                        with recorder.region("compute"):
                            step(number)
                        times[mode].append(time.perf_counter() - began)
                        cpu[mode] += time.process_time() - used
                        used = time.thread_time()
                        recorder.end_step(0)
                        own.append(time.thread_time() - used)
                    calls = ledger.calls() if ledger else calls
                if number % settings.metrics.every == settings.metrics.every - 1 or number == turns - 1:
                    dist.barrier()
                    began = time.perf_counter()
                    waterfall = recorder.take()
                    reports.append(time.perf_counter() - began)
        costs = [cost_of_a_call(record), cost_of_a_call(lambda: everything(groups))]
    if groups.launch.rank == 0:
        assert waterfall is not None  # of the steps just recorded
        print_overhead(times, cpu, calls, costs)
        sums, report, every = sum(own) / turns, statistics.median(reports), settings.metrics.every
        print(f"summing up a step takes {sums * 1e3:.2f} ms of CPU time: {sums * turns / cpu['off']:.2%} of a step's")
        share = report / every / statistics.median(times["off"])
        print(
            f"a report takes {report * 1e3:.2f} ms: {share:.2%} of the {every} steps; the waterfall: {waterfall.line}"
        )


def print_overhead(times: dict[str, list[float]], cpu: dict[str, float], calls: int, costs: list[float]) -> None:
    off, turns = statistics.median(times["off"]), len(times["off"])
    used = cpu["off"] / turns
    print(
        f"{turns} turns of a step without a recorder: {off * 1e3:.1f} ms, median, {used * 1e3:.1f} ms of CPU time, mean;",
        end=" ",
    )
    print(f"{calls} operations")
    for mode, cost in zip(MODES[1:], costs, strict=True):
        ratios = [on / off for on, off in zip(times[mode], times["off"], strict=True)]
        on = statistics.median(times[mode])
        print(f"{mode}: {on * 1e3:.1f} ms; ratio of the medians {on / off:.4f}, of the sums", end=" ")
        print(f"{sum(times[mode]) / sum(times['off']):.4f}, median of ratios {statistics.median(ratios):.4f};", end=" ")
        print(f"CPU time {cpu[mode] / cpu['off']:.4f}")
        print(f"  an operation costs {cost * 1e6:.1f} us of CPU time more: {calls * cost / used:.2%} of a step's")


@contextlib.contextmanager
def everything(groups: Groups) -> Iterator[None]:
    """Ledger and waterfall, which takes operations of one rank for those of several."""
    recorder = Recorder(groups)
    with mock.patch.object(Recorder, "_stops_us", lambda *_: True), record(), recorder.recording(1):
        yield


def cost_of_a_call(recording: Callable[[], contextlib.AbstractContextManager], count: int = 2000) -> float:
    """CPU seconds by which recording makes an operation dearer, on a group of this rank alone: best of several turns."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group, x = groups[dist.get_rank()], torch.ones(1)
    best = {False: float("inf"), True: float("inf")}
    for turn in range(10):
        with recording() if turn % 2 else contextlib.nullcontext():
            began = time.thread_time()
            for _ in range(count):
                dist.all_reduce(x, group=group)
            best[bool(turn % 2)] = min(best[bool(turn % 2)], (time.thread_time() - began) / count)
    return best[True] - best[False]


# ---- replay


def compare(name: str, run: Callable[[], None], link: Link, repeats: int) -> None:
    """Wall-clock of `run`, from a barrier to the last rank's end, beside the replay of its programs."""
    walls, programs = [], []
    run()
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        with record(programs=True) as ledger:
            run()
        wall = torch.tensor([time.perf_counter() - began])
        dist.all_reduce(wall, op=dist.ReduceOp.MAX)
        walls.append(wall.item())
        programs.append(gather_programs(recorded_program(ledger)))
    if dist.get_rank() == 0:
        links = {NODE: link, NETWORK: link}
        best = simulate([fastest(runs) for runs in zip(*programs, strict=True)], links, backend="gloo").seconds
        usual = statistics.median(simulate(each, links, backend="gloo").seconds for each in programs)
        ratio = f"{usual / statistics.median(walls):.3f}"
        print(
            f"{name:36} {statistics.median(walls):9.4f} {usual:9.4f} {ratio:>7}  {min(walls):9.4f} {best:9.4f} {best / min(walls):7.3f}"
        )


def replay(settings: Config, repeats: int) -> None:
    dist.init_process_group("gloo")
    comm = SequenceComm(None)
    one_way, link = (measured_link(comm, 1, both_ways=both) for both in (False, True))
    if comm.rank == 0:
        for name, each in (("one way", one_way), ("both ways", link)):
            print(f"link, {name}: {each.latency * 1e6:.0f} us, {each.bandwidth / 1e6:.0f} MB/s")
        print(
            f"{'seconds: medians, and the least':36} {'wall':>9} {'replay':>9} {'ratio':>7}  {'wall':>9} {'replay':>9} {'ratio':>7}"
        )
    message, x = torch.ones(LARGE), torch.randn(512, 512)
    ends = ({1: message}, {}) if comm.rank == 0 else ({}, {0: message})

    def products(*, overlap: bool) -> None:
        for _ in range(10):
            pending = comm.exchange(*ends)
            if not overlap:
                pending.wait()
            x @ x @ x @ x
            pending.wait()

    compare("10 products, messages of 4 MB", lambda: products(overlap=False), one_way, repeats)
    compare("the same, overlapped", lambda: products(overlap=True), one_way, repeats)
    generator = torch.Generator().manual_seed(0)
    for method, kind in (("ring", "contiguous"), ("ring", "zigzag"), ("gather", "zigzag"), ("ulysses", "contiguous")):
        layout = getattr(SequenceLayout, kind)([4096], 2)
        leaves = [
            torch.randn(layout.tokens(comm.rank), 4, 64, generator=generator, requires_grad=True) for _ in range(3)
        ]

        def attention(method=method, layout=layout, leaves=leaves) -> None:
            q, k, v = leaves
            softmax_attention(q, k, v, layout, comm, method=method).sum().backward()

        compare(f"{method}, {kind}, 4,096 tokens", attention, link, repeats)
    for axis in ("context", "tensor"):
        with training(with_degree(settings, axis)) as (step, _):
            compare(f"training step, {axis} 2", partial(step, 0), link, repeats)


def with_degree(settings: Config, axis: str) -> Config:
    return settings.model_copy(update=dict(parallel=settings.parallel.model_copy(update={axis: 2})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["overhead", "replay"])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--repeats", type=int, default=30, help="turns of steps, or runs of each case")
    arguments, others = parser.parse_known_args()
    torch.set_num_threads(1)
    settings = load(arguments.config, parse_overrides(["--train.precision", "fp32", *others]))
    {"overhead": overhead, "replay": replay}[arguments.part](settings, arguments.repeats)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
