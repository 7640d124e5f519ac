"""Sections `environment` and `speed` of `bench/gpu.py`: what the machine reaches, and kernels beside their peers.

All sides of a case take turns, call by call, on the same inputs; before each call the L2 cache is overwritten. Times are
CUDA events around whole calls, launches included, in milliseconds, medians. `busy` is the sum over the kernels of one
forward and backward as the profiler sees them: where it is well below the time, the host is what one waits for.
"""

import contextlib
import importlib
import importlib.util
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.gpu_parts.correct import VARIANTS, cumulative, error, linear_tensors
from bench.gpu_parts.peers import linear_peer, softmax_sides
from lsys.kernels.linear_attention import linear_attention

Case = dict[str, Any]
Work = Callable[[], Any]
PEERS = ("fla", "flash_attn", "flash_attn_interface", "transformer_engine", "megatron.core", "tilelang", "einops")
HEADS, WIDTH, CHUNK = 16, 128, 64
SECONDS = 1.5  # of measuring a set of sides


# ---- cases


def groups(smoke: bool, scratch: str = "") -> list[list[Case]]:
    """A process each: what matters most, timed; the same with a profiler, which may slow the host; all other sizes."""
    sizes = [(32, False)] if smoke else [(32768, False), (32768, True)]
    first = [case for size in sizes for case in _cases(*size, smoke)]
    if smoke:
        return [first]
    more = [(131072, False), (8192, False), (262144, False), (131072, True), (8192, True), (262144, True)]
    profiled = [case | {"profiled": True} for case in first if not case["packed"]]
    return [first, profiled, [case for size in more for case in _cases(*size, smoke)]]


def _cases(tokens: int, packed: bool, smoke: bool) -> list[Case]:
    variants = ("token",) if smoke else VARIANTS
    found = [_case("linear", variant, tokens, packed, smoke) for variant in variants]
    # The work of softmax attention grows with the square.
    return found + ([_case("softmax", "softmax", tokens, packed, smoke)] if tokens <= 32768 else [])


def warming(smoke: bool) -> list[list[Case]]:
    """Every side once, in processes of its own, side by side: compiles what the timed process then finds compiled."""
    if smoke:
        return []
    cases = [_case("linear", variant, 8192, packed, smoke) for variant in VARIANTS for packed in (False, True)]
    return [[case | {"warm": side}] for case in cases for side in ("lsys", "peer")]


def _case(family: str, variant: str, tokens: int, packed: bool, smoke: bool) -> Case:
    name = f"{variant}, {f'{tokens // 1024}K' if tokens >= 1024 else tokens} tokens, {'packed' if packed else 'one document'}"
    sizes = dict(heads=1, keys=16, values=16, dtype="float32") if smoke else {}
    sizes = dict(heads=HEADS, keys=WIDTH, values=WIDTH, dtype="bfloat16") | sizes
    return (
        dict(name=name, family=family, variant=variant, tokens=tokens, packed=packed)
        | sizes
        | {"key_heads": sizes["heads"]}
    )


def lengths(case: Case) -> list[int]:
    """One document, or some from 16 tokens to a quarter of all, short ones as frequent as long ones on a logarithmic scale."""
    if not case["packed"]:
        return [case["tokens"]]
    generator, left, found = random.Random(0), case["tokens"], []
    while left:
        found.append(min(left, int(16 * (case["tokens"] / 64) ** generator.random())))
        left -= found[-1]
    return found


# ---- measuring


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


@lru_cache
def _cache() -> Tensor:
    """More than any L2."""
    return torch.empty(1 << 28 if device() == "cuda" else 1 << 10, dtype=torch.int8, device=device())


def _timed(work: Work) -> Callable[[], float]:
    """Starts the work; what is returned gives the milliseconds, after a synchronisation."""
    _cache().zero_()  # also gives the host a start
    if device() == "cpu":
        began = time.perf_counter()
        work()
        took = 1e3 * (time.perf_counter() - began)
        return lambda: took
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    return lambda: first.elapsed_time(last)


def medians(sides: dict[str, Work]) -> dict[str, tuple[float, float]]:
    """Median and spread (from the first to the last quartile, over the median) of each side, taking turns."""
    rounds = 1
    if device() == "cuda":
        for work in sides.values():  # compiles, tunes, sets handles up
            work()
            work()
        synchronize()
        began = time.perf_counter()
        for work in sides.values():
            work()
        synchronize()
        rounds = max(5, min(100, int(SECONDS / (time.perf_counter() - began))))
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in sides}
    order = list(sides)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            pending[name].append(_timed(sides[name]))
    synchronize()
    found = {}
    for name, each in pending.items():
        times = [take() for take in each]
        middle = statistics.median(times)
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [middle] * 3
        found[name] = middle, (quartiles[2] - quartiles[0]) / middle
    return found


def peak_mib(work: Work) -> float:
    """The most memory that the work takes beyond what there is."""
    if device() == "cpu":
        return 0.0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def busy(work: Work) -> dict[str, Any]:
    """Milliseconds of all kernels in one run, and of the longest by name."""
    from torch.profiler import ProfilerActivity, profile

    work()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        synchronize()
    each = {row.key[:60]: row.self_device_time_total / 1e3 for row in seen.key_averages() if row.self_device_time_total}
    longest = sorted(each, key=lambda name: -each[name])[:10]
    return {"busy ms": sum(each.values()), "kernels": {name: each[name] for name in longest}}


@lru_cache
def ceilings() -> tuple[float, float]:
    """Bytes/s of a large copy, read and written, and FLOP/s of a large bf16 product, of random numbers."""
    size, side = (1 << 31, 8192) if device() == "cuda" else (1 << 22, 256)
    x = torch.randint(0, 100, (size,), dtype=torch.int8, device=device())
    y = torch.empty_like(x)
    a, b = (torch.randn(side, side, device=device()).bfloat16() for _ in range(2))
    found = medians({"copy": lambda: y.copy_(x), "product": lambda: a @ b})
    return 2 * size / found["copy"][0] * 1e3, 2 * side**3 / found["product"][0] * 1e3


# ---- section `environment`


def machine() -> Case:
    import triton

    found: Case = {"torch": torch.__version__, "triton": triton.__version__}
    for name in PEERS:
        with contextlib.suppress(Exception):  # whatever a foreign package does at its import
            if importlib.util.find_spec(name):
                found[name] = getattr(importlib.import_module(name), "__version__", "present")
    if device() == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "GPU": properties.name,
            "GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "L2 MiB": getattr(properties, "L2_cache_size", 0) / 2**20,
        }
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
        bandwidth, flops = ceilings()
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            said = subprocess.run(query, capture_output=True, text=True).stdout.strip().split(", ")
            found |= dict(zip(fields.split(","), said, strict=False))
    else:
        bandwidth, flops = ceilings()
    found |= {"copy GB/s, read and written": round(bandwidth / 1e9, 1), "bf16 product TFLOP/s": round(flops / 1e12, 1)}
    return {"status": "measured", "found": found}


# ---- section `speed`


def bound_ms(case: Case) -> tuple[float, float]:
    """Forward, and forward and backward: the least time that this machine's copies and products would take.

    Forward, q, k and v are read and o is written, and decay and beta; backward, q, k, v and do are read, dq, dk and dv
    written. A token and head takes 4 K V + 4 C V operations forward, C of the chunk, and twice those backward. Softmax
    attention: 4 D operations for each pair of tokens forward, 10 D backward.
    """
    bandwidth, flops = ceilings()
    rows, k, v = case["tokens"] * case["heads"], case["keys"], case["values"]
    if case["family"] == "softmax":
        pairs = sum(n * (n + 1) // 2 for n in lengths(case)) * case["heads"]
        return 4e3 * k * pairs / flops, 14e3 * k * pairs / flops
    element = torch.finfo(getattr(torch, case["dtype"])).bits // 8
    more = {"token": 4, "channel": 4 * k, "delta": 4, "gated delta": 8}.get(case["variant"], 0)
    forward, backward = (2 * k + 2 * v) * element + more, (4 * k + 3 * v) * element + 2 * more
    work = 4 * k * v + 4 * CHUNK * v
    moved = (forward * rows / bandwidth, (forward + backward) * rows / bandwidth)
    return max(moved[0], work * rows / flops) * 1e3, max(moved[1], 3 * work * rows / flops) * 1e3


def both(attend: Callable[..., Tensor], leaves: list[Tensor], do: Tensor) -> tuple[Work, Work]:
    """Forward alone, and forward and backward."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attend()

    return forward, lambda: torch.autograd.grad(attend(), leaves, do)


def linear_sides(case: Case) -> tuple[dict[str, tuple[Work, Work]], str]:
    """By name, and what is to be said of the peer. A decay fixed per head has no gradient, as in Lightning attention."""
    tensors, weights = linear_tensors(case, device(), case["tokens"], 0)
    q, k, v = (tensors[name][None].requires_grad_() for name in ("q", "k", "v"))
    beta = tensors["beta"][None].requires_grad_() if "beta" in tensors else None
    decay = tensors.get("decay of heads")
    decay = tensors["decay"][None].requires_grad_() if "decay" in tensors else decay
    leaves = [x for x in (q, k, v, decay, beta) if x is not None and x.requires_grad]
    do, cu = weights["o"][None], cumulative(lengths(case)) if case["packed"] else None

    def mine() -> Tensor:
        return linear_attention(q, k, v, decay, beta, cu_seqlens=cu, backend="triton")[0]

    sides = {} if case.get("warm") == "peer" else {"lsys": both(mine, leaves, do)}
    if case.get("warm") == "lsys":
        return sides, ""
    peer, note = linear_peer(
        case["variant"], (q, k, v, decay, beta), None if cu is None else cu.to(device()), leaves, do
    )
    return sides | ({} if peer is None else {"fla": both(peer, leaves, do)}), note


def softmax_case(case: Case) -> tuple[dict[str, tuple[Work, Work]], str]:
    tokens, heads, width, dtype = case["tokens"], case["heads"], case["keys"], getattr(torch, case["dtype"])
    q, k, v, do = (torch.randn(tokens, heads, width, device=device()).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sides, note = softmax_sides(q, k, v, lengths(case))
    return {name: both(attend, leaves, do) for name, attend in sides.items()}, note


def run(case: Case) -> Case:
    if case["family"] == "machine":
        return machine()
    sides, note = (linear_sides if case["family"] == "linear" else softmax_case)(case)
    if case.get("warm"):
        for work in (each for side in sides.values() for each in side):
            work()
        synchronize()
        return {"status": "measured", "note": note}
    if case.get("profiled"):
        try:
            return {"status": "measured", "note": note, "sides": {name: busy(side[1]) for name, side in sides.items()}}
        except (AssertionError, RuntimeError) as failure:  # no profiler there
            return {"status": "skipped", "error": f"profiler: {failure}"}
    outputs = {name: forward().detach().flatten() for name, (forward, _) in sides.items()}
    found: Case = {"status": "measured", "note": note, "documents": len(lengths(case)), "sides": {}}
    apart = {name: error(o.double(), outputs["lsys"].double()) for name, o in outputs.items() if name != "lsys"}
    del outputs
    forward = medians({name: side[0] for name, side in sides.items()})
    whole = medians({name: side[1] for name, side in sides.items()})
    bounds = bound_ms(case)
    for name, side in sides.items():
        row = {
            "forward ms": forward[name][0],
            "forward spread": forward[name][1],
            "both ms": whole[name][0],
            "both spread": whole[name][1],
        }
        row |= {
            "share of bound, forward": bounds[0] / row["forward ms"],
            "share of bound, both": bounds[1] / row["both ms"],
        }
        row |= {"peak MiB": peak_mib(side[1]), "difference of o": apart.get(name, 0.0)}
        found["sides"][name] = row
    return found
