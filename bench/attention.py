"""Attention across ranks: every method in one run, against its controls.

    python bench/attention.py [SECTION ...] [--tokens 16384] [--out docs/benchmarks/attention.json]

Sections (all if none is named):
  methods   wall-clock at 2 ranks of one thread, on one node and over a slow link (network namespaces, root); bytes by the
            ledger and by formula; zigzag against contiguous
  replay    the same at 4, 8 and 64 ranks, replayed with a device for each rank, over fast and slow links
  overlap   2 ranks over a link as slow as the computation: overlapped against serial (network namespaces, root)
  memory    peak live tensor bytes of a rank against the number of ranks, with the fitted curve
  long      128K tokens exact on 4 ranks, and 1M tokens with a window
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import tyro

from bench.common.tools import launch, run_sections, show
from bench.workers.attention import Case, attend
from lsys.kernels.softmax_attention import softmax_attention as one_device
from lsys.parallel.attention import METHODS
from lsys.parallel.ledger import NETWORK, NODE
from lsys.parallel.messages.choice import seconds
from lsys.parallel.replay import Link, Links, Program, SoloComm, fastest, simulate

WORKER = "attention.py"
LAYOUTS = ("contiguous", "zigzag")
RANKS_PER_NODE = 8
SHAPED = "118mbit"  # about where this machine's transfers take as long as its computation
# A CPU core computes some 10,000 times slower than a GPU; so are these links slower than NVLink and InfiniBand.
LINKS: dict[str, Links] = {
    "fast": {NODE: Link(5e-6, 5e9), NETWORK: Link(20e-6, 1e9)},
    "slow": {NODE: Link(5e-6, 100e6), NETWORK: Link(20e-6, 12.5e6)},
}


@dataclass(frozen=True)
class Options:
    """Attention across ranks, every method in one run."""

    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """methods, replay, overlap, memory, long; all if none is named."""
    tokens: Annotated[int, tyro.conf.arg(help="Tokens of the one causal document.")] = 16384
    heads: int = 4
    width: int = 64
    out: Path | None = None
    """Where the figures go, as JSON; sections that were not run keep theirs."""

    def case(self, **changes: Any) -> Case:
        case = Case("ring", "zigzag", (self.tokens,), self.heads, self.heads, self.width)
        return replace(case, **changes)


def methods(options: Options) -> dict[str, Any]:
    cases = [options.case(method=method, layout=layout) for method in METHODS for layout in LAYOUTS]
    found, slow = launch(WORKER, cases, 2), launch(WORKER, cases, 2, SHAPED)
    rows = [
        [
            case.method,
            case.layout,
            result["seconds"],
            over["seconds"],
            *(sum(result[k]) / 1e6 for k in ("received", "formula")),
        ]
        for case, result, over in zip(cases, found, slow, strict=True)
    ]
    show(
        f"2 ranks, {options.tokens} tokens",
        ["method", "layout", "seconds", f"s {SHAPED}", "MB ledger", "MB formula"],
        rows,
    )
    for case, result in zip(cases, found, strict=True):
        if result["received"] != result["formula"]:
            raise SystemExit(f"{case}: the ledger saw {result['received']} bytes, the formula says {result['formula']}")
    ratio = found[0]["seconds"] / found[1]["seconds"]
    print(f"ring, contiguous over zigzag: {ratio:.3f} (at least 1.35, ceiling 1.5)")
    return {"rows": rows, "contiguous over zigzag": ratio}


def programs(case: Case, ranks: int, runs: int = 2) -> list[Program]:
    """What each rank does, measured alone, one rank after the other."""
    nodes = [rank // RANKS_PER_NODE for rank in range(ranks)]
    layout, made = case.make_layout(ranks), []
    for rank in range(ranks):
        comm, tensors, seen = SoloComm(rank, ranks, nodes), case.tensors(layout.tokens(rank)), []
        attend(case, layout, comm, tensors)
        for _ in range(runs):
            comm.restart()
            attend(case, layout, comm, tensors)
            seen.append(comm.program)
        made.append(fastest(seen))
    return made


def replay(options: Options) -> dict[str, Any]:
    rows: list[list[Any]] = []
    for ranks in (4, 8, 64):
        for method in METHODS:
            for layout in LAYOUTS:
                made = programs(options.case(method=method, layout=layout), ranks)
                lines = [simulate(made, links) for links in LINKS.values()]
                rows.append([ranks, method, layout, *(x for line in lines for x in (line.seconds, line.efficiency))])
    heads = ["ranks", "method", "layout", *(f"{name} {what}" for name in LINKS for what in ("s", "efficiency"))]
    show(f"replay, {options.tokens} tokens", heads, rows)
    seconds = {tuple(row[:3]): row[3] for row in rows}
    ratio = seconds[8, "ring", "contiguous"] / seconds[8, "ring", "zigzag"]
    print(f"ring at 8 ranks, contiguous over zigzag: {ratio:.3f} (at least 1.7, ceiling 1.875)")
    return {"heads": heads, "rows": rows, "contiguous over zigzag at 8": ratio}


def overlap(options: Options) -> dict[str, Any]:
    kinds = {name: options.case(comm=name) for name in ("none", "serial", "overlapped")}
    alone = launch(WORKER, [kinds["none"]], 2)[0]["seconds"]
    forward, backward = options.case().phases((0, 1))
    # Bytes that follow one another: in each step those of the direction that has more. TCP's payload is 99.3% of jumbo frames.
    links = dict.fromkeys((NODE, NETWORK), Link(0.0, 1.0))  # at 1 byte/s
    serial_bytes = sum(seconds(phase, (0, 1), links) for phase in (*forward, *backward))
    rate = round(8 * serial_bytes / alone / 0.993 / 1e3)  # kbit/s
    serial, overlapped = (
        r["seconds"] for r in launch(WORKER, [kinds["serial"], kinds["overlapped"]], 2, f"{rate}kbit")
    )
    rows = [["computation alone", alone, 1.0], ["serial", serial, serial / alone]]
    rows.append(["overlapped", overlapped, overlapped / alone])
    show(
        f"ring over a link of {rate / 1e3:.0f} Mbit/s: {serial_bytes / 1e6:.1f} MB in as long as the computation takes",
        ["", "seconds", "ratio"],
        rows,
    )
    print("serial at least 1.8, overlapped at most 1.25")
    return {"mbit": rate / 1e3, "rows": rows}


def memory(options: Options) -> dict[str, Any]:
    from torch.distributed._tools.mem_tracker import MemTracker

    rows: list[list[Any]] = []
    for ranks in (8, 16, 32, 64):  # one round of blocks; fewer ranks hold parts of blocks, and less
        case, peaks = options.case(), []
        layout = case.make_layout(ranks)
        for rank in (0, ranks // 2, ranks - 1):
            tensors, comm = case.tensors(layout.tokens(rank)), SoloComm(rank, ranks)
            attend(case, layout, comm, tensors)
            with MemTracker() as tracker:
                tracker.track_external(*tensors)
                attend(case, layout, comm, tensors)
            peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
        rows.append([ranks, max(peaks) / 1e6])
    shares = torch.tensor([[1.0, 1 / ranks] for ranks, _ in rows], dtype=torch.float64)
    peaks_ = torch.tensor([[peak] for _, peak in rows], dtype=torch.float64)
    fixed, shared = torch.linalg.lstsq(shares, peaks_).solution.flatten().tolist()
    for row in rows:
        row += [fixed + shared / row[0]]
    show(f"peak live tensors of a rank in MB, ring, {options.tokens} tokens", ["ranks", "MB", "fit"], rows)
    print(f"fit: {fixed:.2f} + {shared:.2f} / ranks")
    return {"rows": rows, "fixed": fixed, "shared": shared}


def long(options: Options) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens, window in ((128 * 1024, None), (1024 * 1024, 1024)):
            alone_at = f"{folder}/{tokens}.pt"
            case = Case("ring", "zigzag", (tokens,), 1, 1, 32, window, repeats=0, reference=alone_at)
            started = time.perf_counter()
            *leaves, do = case.tensors(tokens)
            for x in leaves:
                x.requires_grad_()
            ends = torch.tensor([0, tokens])
            o, _ = one_device(*leaves, cu_seqlens_q=ends, cu_seqlens_k=ends, window=window)
            gradients = torch.autograd.grad(o, leaves, do)
            torch.save([x.detach() for x in (*leaves, do, o, *gradients)], alone_at)
            alone = time.perf_counter() - started
            started = time.perf_counter()
            cases = [case, replace(case, layout="contiguous")] if window else [case]
            for each, result in zip(cases, launch(WORKER, cases, 4), strict=True):
                rows.append(
                    [tokens, window or "none", each.layout, alone, time.perf_counter() - started, *result["errors"]]
                )
    heads = ["tokens", "window", "layout", "one device s", "4 ranks s", "o", "dq", "dk", "dv"]
    show("largest difference from one device, fp32, relative", heads, rows)
    if max(max(row[5:]) for row in rows) > 1e-5:
        raise SystemExit("the result differs from one device by more than 1e-5")
    return {"heads": heads, "rows": rows}


SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "methods": methods, "replay": replay, "overlap": overlap, "memory": memory, "long": long,
}  # fmt: skip


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    run_sections(SECTIONS, chosen.sections, chosen, chosen.out)
