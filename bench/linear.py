"""Linear attention on one device and across ranks, each beside its controls.

    python bench/linear.py [SECTION ...] [--out docs/benchmarks/linear.json]

Sections (all if none is named):
  device    chunked forward and backward on one thread, 8K to 64K tokens, every variant; beside quadratic attention at 16K
  methods   wall-clock at 2 ranks of one thread, on one node and over a slow link (network namespaces, root); bytes, calls
  replay    one layer of a 1B model at 4, 8, 64 and 256 ranks, replayed over the links of published hardware
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro

from bench.common.tools import launch, run_sections, show
from bench.workers.linear import VARIANTS, Case, attend
from lsys.parallel.gpus import GPUS
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages import Placement, attention, linear
from lsys.parallel.methods import SOFTMAX, STATE
from lsys.parallel.replay import Compute, Issue, Program, SoloComm, fastest, simulate

WORKER = "linear.py"
STATE_METHODS = tuple(STATE)
RANKS_PER_NODE = 8
SHAPED = "118mbit"


@dataclass(frozen=True)
class Options:
    """Linear attention, every method in one run."""

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """device, methods, replay; all if none is named."""
    tokens: Annotated[int, tyro.conf.arg(help="Tokens of the one document of `methods`.")] = 16384
    out: Path | None = None
    """Where the figures go, as JSON; sections that were not run keep theirs."""


# ---- one device


def seconds(work: Any, repeats: int = 3) -> float:
    """The best of the repeats, after a first run."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def device(options: Options) -> dict[str, Any]:
    sizes = (8192, 16384, 32768, 65536)
    case = Case("lasp2", "none", (sizes[1],))
    shape = (1, case.heads, sizes[1], case.width)
    q, k, v, do = (torch.randn(shape) for _ in range(4))

    def quadratic() -> None:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), leaves, do)

    softmax = seconds(quadratic, 2)
    rows: list[list[Any]] = []
    for variant in VARIANTS:
        runs: list[Callable[[], Any]] = []
        for tokens in sizes:
            one = replace(case, variant=variant, lengths=(tokens,))
            runs.append(partial(attend, one, one.make_layout(1), None, one.tensors(tokens)))
        times = least(runs)
        per_token = times[-1] / sizes[-1] / (times[0] / sizes[0])
        rows.append([variant, *times, per_token, softmax / times[1]])
    heads = ["variant", *(f"{size // 1024}K s" for size in sizes), "64K/8K", "x softmax"]
    show(
        f"one thread, forward and backward, {case.heads} heads of {case.width}; softmax at 16K {softmax:.3f} s",
        heads,
        rows,
    )
    print("time per token at 64K at most 1.2 of that at 8K; at least 5x faster than softmax at 16K")
    return {"heads": heads, "rows": rows, "softmax": softmax}


# ---- two ranks


def least(runs: list[Callable[[], Any]], rounds: int = 6) -> list[float]:
    """Least time of each, in turns, after one round: what else the machine does falls on all of them, and goes."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + rounds):
        for run, own in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in times]


def methods(options: Options) -> dict[str, Any]:
    cases = [
        Case(method, variant, (options.tokens,), layout)
        for variant in ("head", "token", "gated delta")
        for method in STATE_METHODS
        for layout in ("contiguous", "zigzag")
    ] + [Case("ring", "none", (options.tokens,), "zigzag", repeats=2)]
    rows = [
        [case.method, case.variant, case.layout, near["seconds"], far["seconds"], sum(near["received"]) / 1e6, max(near["calls"])]
        for case, near, far in zip(cases, launch(WORKER, cases, 2), launch(WORKER, cases, 2, SHAPED), strict=True)
    ]  # fmt: skip
    heads = ["method", "variant", "layout", "seconds", f"s {SHAPED}", "MB", "calls"]
    show(f"2 ranks, {options.tokens} tokens, forward and backward", heads, rows)
    return {"heads": heads, "rows": rows}


# ---- many ranks


# Shares of data sheets' peaks that are taken to be reached: of products; of memory's bound, which published kernels of linear attention
# reach 7 to 16% of.
MATRIX_SHARE, LINEAR_SHARE = 0.5, 0.10
HEADS, WIDTH, HIDDEN, FFN, BYTES = 16, 128, 2048, 5504, 2  # a 1B model's layer, in bf16


@dataclass(frozen=True)
class Setting:
    """One published comparison: so many ranks and tokens of one document."""

    gpu: str
    ranks: int
    tokens: int

    @property
    def own(self) -> int:
        return self.tokens // self.ranks

    def dense_seconds(self) -> float:
        """Projections and MLP of this rank's tokens, forward and backward."""
        weights = 5 * HIDDEN * HEADS * WIDTH + 3 * HIDDEN * FFN
        gpu = GPUS[self.gpu.upper()]
        return 3 * 2 * weights * self.own / (gpu.bf16 * MATRIX_SHARE)

    def linear_seconds(self) -> float:
        """Linear attention of this rank's tokens, all heads: HBM's bound, q, k, v and o once, thrice for both passes."""
        gpu = GPUS[self.gpu.upper()]
        return 3 * 4 * WIDTH * BYTES * HEADS * self.own / (gpu.bandwidth * LINEAR_SHARE)

    def softmax_seconds(self) -> float:
        """Causal softmax attention of this rank's share: 4 T^2 D / 2 forward, 2.5 times that backward."""
        gpu = GPUS[self.gpu.upper()]
        return 3.5 * 2 * self.tokens * self.own * HEADS * WIDTH / (gpu.bf16 * MATRIX_SHARE)


SETTINGS = (
    Setting("a100", 4, 131072), Setting("a100", 8, 262144), Setting("a100", 64, 524288), Setting("a100", 64, 2097152),
    Setting("h100", 256, 8388608),
)  # fmt: skip


def solo(case: Case, layout: SequenceLayout, rank: int, runs: int) -> Program:
    """What the rank does, measured alone."""
    comm = SoloComm(rank, layout.ranks, [each // RANKS_PER_NODE for each in range(layout.ranks)])
    tensors, seen = case.tensors(layout.tokens(rank)), []
    for _ in range(runs):
        comm.restart()
        attend(case, layout, comm, tensors)
        seen.append(comm.program)
    return fastest(seen[1:] or seen)


def scaled(program: Program, compute: float, sizes: float, first: float) -> Program:
    """`compute` seconds of computation in all, in the measured proportions; bytes times `sizes`; `first` seconds before."""
    whole = sum(step.seconds for step in program.steps if isinstance(step, Compute))
    steps: list[Any] = [Compute(first)]
    for step in program.steps:
        if isinstance(step, Compute):
            step = Compute(step.seconds * compute / whole)
        elif isinstance(step, Issue):
            op = step.operation
            grown = replace(
                op,
                bytes=round(op.bytes * sizes),
                send=tuple(round(n * sizes) for n in op.send),
                receive=tuple(round(n * sizes) for n in op.receive),
            )
            step = replace(step, operation=grown)
        steps.append(step)
    return replace(program, steps=tuple(steps))


FEW = 128  # tokens of a rank, for the operations alone


def programs(setting: Setting, method: str) -> list[Program]:
    """One layer of every rank: operations by the method's own code, computation by published figures.

    States do not depend on the number of tokens, so few tokens a rank give the operations of linear attention. How its
    computation lies between them is measured with all, on a first, a middle and a last rank, one head of full width.
    """
    ranks, before = setting.ranks, setting.dense_seconds()
    if method == "ring":
        case = Case("ring", "none", (FEW * ranks,), "zigzag", heads=1, width=WIDTH)
        seconds, sizes = (
            setting.softmax_seconds(),
            setting.own / FEW * HEADS * BYTES / 4,
        )  # bf16 of all heads and tokens
        layout = case.make_layout(ranks)
        return [scaled(solo(case, layout, rank, 4), seconds, sizes, before) for rank in range(ranks)]
    is_heads = method == "ulysses"
    case = Case(method, "token", (FEW * ranks,), heads=HEADS if is_heads else 1, width=WIDTH)
    seconds, sizes = setting.linear_seconds(), setting.own / FEW * BYTES / 4 if is_heads else HEADS
    layout, made = case.make_layout(ranks), []
    large = replace(case, lengths=((4096 if is_heads else setting.own) * ranks,))  # no states: any number will do
    measured = {rank: solo(large, large.make_layout(ranks), rank, 4) for rank in {0, ranks // 2, ranks - 1}}
    for rank in range(ranks):
        program, like = solo(case, layout, rank, 1), measured[rank if rank in measured else ranks // 2]
        steps = tuple(
            other if isinstance(step, Compute) and isinstance(other, Compute) else step
            for step, other in zip(program.steps, like.steps, strict=True)
        )
        made.append(scaled(replace(program, steps=steps), seconds, sizes, before))
    return made


def steps_of(method: str, ranks: int) -> int:
    """Transfers of a forward pass that follow one another: a message each, but for collectives."""
    nodes = [rank // RANKS_PER_NODE for rank in range(ranks)]
    if method == "ring":
        place, shape = Placement.of("zigzag", [FEW * ranks], ranks), attention.Shape(HEADS, HEADS, WIDTH, BYTES)
        return len(SOFTMAX[method].phases(place, shape, nodes).forward)
    place = Placement.of("contiguous", [FEW * ranks], ranks)
    return len(STATE[method].phases(place, linear.Shape(HEADS, HEADS, WIDTH, WIDTH, "token")).forward)


def replay(options: Options) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for setting in SETTINGS:
        ranks, links, found = setting.ranks, GPUS[setting.gpu.upper()].links, {}
        names = [name for name in STATE if ranks <= HEADS or not STATE[name].whole]
        for method in (*names, "ring") if ranks <= 64 else names:
            found[method] = simulate(programs(setting, method), links).seconds
            attending = setting.softmax_seconds() if method == "ring" else setting.linear_seconds()
            exposed = found[method] - setting.dense_seconds() - attending
            milliseconds = found[method] * 1e3, exposed * 1e3
            rows.append([setting.gpu, ranks, setting.tokens // 1024, method, *milliseconds, steps_of(method, ranks)])
        for row in rows[-len(found) :]:
            row.append(found["lasp2"] / found[row[3]])
    heads = ["links", "ranks", "K tokens", "method", "ms a layer", "ms exposed", "steps", "speed/lasp2"]
    show("replay: one layer of a 1B model, forward and backward", heads, rows)
    return {"heads": heads, "rows": rows}


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    run_sections({"device": device, "methods": methods, "replay": replay}, chosen.sections, chosen, chosen.out)
