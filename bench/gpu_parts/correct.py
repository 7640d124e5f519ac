"""Section `correct` of `bench/gpu.py`: kernels against their definitions in fp64, on the GPU.

Inputs are rounded to the dtype first, so that both sides see the same numbers. An error is |found - wanted| / |wanted|,
norms of whole tensors; NaN is beyond any tolerance, and what a kernel leaves unwritten is NaN (`poison`). Linear
attention runs twice and must give the same bits: it has no atomics, and a result that moves is a race.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.kernels.linear_attention import linear_attention, segments
from lsys.kernels.linear_attention.transition import carry
from lsys.kernels.short_convolution import short_convolution
from lsys.kernels.softmax_attention import Tile, attend, attend_backward, empty_result, softmax_attention

Case = dict[str, Any]
Tensors = dict[str, Tensor]

# Sums are in fp32; what is rounded to the dtype are operands and results. fp32 products have three tf32 parts.
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4}
# The gradient of a decay per head sums, over all tokens, terms that cancel: rounding of each weighs more.
SUMMED, TIMES = "d decay of heads", 3
VARIANTS = ("none", "head", "token", "channel", "delta", "gated delta")
# No token, one, primes, whole chunks of 64, one more and one less; the last goes over several spans of 1,024.
PACK = (0, 1, 7, 31, 64, 65, 127, 0, 257, 2503)
PAIRS = ((7, 9), (0, 3), (128, 128), (1, 1), (1, 300), (131, 131), (977, 1500))  # queries and keys of sequences


# ---- cases


def groups(smoke: bool, scratch: str = "") -> list[list[Case]]:
    """Those that share kernels, and so compilations, together; the most important first."""
    return list(_smoke() if smoke else _all())


def _linear(kind: str, variant: str, dtype: str, width: int, **more: Any) -> Case:
    name = f"linear attention, {variant}, {kind}, {dtype}, {width}"
    sizes = dict(lengths=PACK, heads=2, key_heads=1, keys=width, values=width)
    return dict(name=name, family="linear", kind=kind, variant=variant, dtype=dtype) | sizes | more


def _all() -> Iterator[list[Case]]:
    for width in (128, 64):
        for variant in VARIANTS:
            kinds: tuple[str, ...] = ("pack", "phases", "causality", "batch")
            kinds += ("large",) if width == 128 else ("both ways",)
            yield [_linear(kind, variant, "bfloat16", width) for kind in kinds]
    for backend in ("cuda", "flash_attn"):
        yield [
            _softmax(backend, kind, "bfloat16", width, window)
            for width in (128, 64, 40)
            for kind, window in (
                ("causal", None),
                ("causal", 100),
                ("full", None),
                ("merge", None),
                ("causality", None),
            )
        ]
    kinds, backends = ("sequences", "causality"), ("triton", "sliding")
    yield [_convolution(*each) for each in itertools.product(kinds, ("bfloat16", "float32"), backends)]
    for dtype, width in (("float32", 64), ("bfloat16", 256), ("float16", 64), ("float32", 128)):
        short = (0, 1, 7, 65, 1100)
        kinds = ("pack", "phases", "causality")
        for variant in VARIANTS:
            yield [_linear(kind, variant, dtype, width, lengths=short) for kind in kinds]
    for variant in VARIANTS:  # widths that no block divides
        yield [
            _linear("pack", variant, "bfloat16", 72, values=40),
            _linear("pack", variant, "bfloat16", 140, values=150),
        ]


def _smoke() -> Iterator[list[Case]]:
    """One of each kind, of so few tokens and channels that interpreting them takes seconds."""

    def tiny(kind: str, variant: str, *lengths: int) -> Case:
        return _linear(kind, variant, "float32", 16, lengths=lengths)

    yield [tiny("pack", "token", 0, 1, 70), tiny("causality", "none", 2, 66), tiny("batch", "none", 9, 9)]
    yield [tiny("pack", "gated delta", 0, 1, 18), tiny("phases", "head", 3, 0, 5)]
    pairs = dict(pairs=PAIRS[:4])
    softmax = [_softmax("cpu", "causal", "float32", 16, 5), _softmax("cpu", "merge", "float32", 16, None)]
    softmax += [_softmax("cpu", "causality", "float32", 16, None), _softmax("cuda", "full", "float32", 16, None)]
    yield [case | pairs for case in softmax] + [
        _convolution(kind, "float32", "triton") for kind in ("sequences", "causality")
    ]


def _softmax(backend: str, kind: str, dtype: str, width: int, window: int | None) -> Case:
    name = f"softmax attention, {backend}, {kind}{f', window {window}' if window else ''}, {dtype}, {width}"
    return dict(
        name=name, family="softmax", kind=kind, backend=backend, dtype=dtype, width=width, window=window, pairs=PAIRS
    )


def _convolution(kind: str, dtype: str, backend: str) -> Case:
    name = f"short convolution by {backend}, {kind}, {dtype}"
    return dict(name=name, family="convolution", kind=kind, dtype=dtype, lengths=PACK[:-1], backend=backend)


# ---- what all families share


def poison() -> None:
    """New tensors that are not filled hold NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # a property, which the module gets at run time
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*deterministic.*")


def error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    if wanted.numel() == 0:
        return 0.0
    difference = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    return difference.nan_to_num(math.inf, math.inf).item()


def verdict(errors: dict[str, float], tolerance: float, **facts: bool) -> Case:
    """What is recorded: each error, the worst, and facts that must hold."""
    allowed = {name: tolerance * (TIMES if name == SUMMED else 1) for name in errors}
    wrong = [name for name, each in errors.items() if not each < allowed[name]] + [
        name for name, ok in facts.items() if not ok
    ]
    shown = {name: each if math.isfinite(each) else "not finite" for name, each in errors.items()}
    worst = max(errors.values(), default=0.0)
    found = {"status": "failed" if wrong else "passed", "errors": shown, "tolerance": tolerance, **facts}
    return found | {
        "worst": worst if math.isfinite(worst) else "not finite",
        "error": f"wrong: {', '.join(wrong)}" if wrong else "",
    }


def draw(device: str, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device)


def cumulative(lengths: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def gradients(outputs: Tensors, leaves: Tensors, weights: Tensors) -> Tensors:
    """The outputs, and of sum(output * weight) the gradients of all leaves."""
    loss: Any = sum((outputs[name] * weights[name].to(outputs[name].dtype)).sum() for name in outputs)
    found = torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True)
    return {name: x.detach() for name, x in outputs.items()} | {f"d {n}": x for n, x in zip(leaves, found, strict=True)}


def fresh(leaves: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {name: x.detach().clone().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}


def bits_before(run: Callable[[Tensors], Tensor], leaves: Tensors, lengths: Any) -> dict[str, bool]:
    """Whether a change of one token leaves all bits of tokens before it and of other sequences, and changes its own."""
    ends = cumulative(lengths).tolist()
    spans = [(a, b) for a, b in pairwise(ends) if b - a > 1][-2:]
    places = {(at, b) for a, b in spans for at in (a, (a + b) // 2, min(a + 64, b - 1), b - 1)}
    with torch.no_grad():
        before, is_causal, is_seen = run(leaves), True, True
        for at, last in sorted(places):
            changed = {name: x.clone() for name, x in leaves.items()}
            for name, x in changed.items():
                if name not in ("initial", "decay of heads"):
                    x[at] *= 0.5
            same = (run(changed) == before).flatten(1).all(1)
            is_causal &= bool(same[:at].all() and same[last:].all())
            is_seen &= not bool(same[at])
    return {"causal": is_causal, "seen": is_seen}


# ---- linear attention


def linear_tensors(case: Case, device: str, tokens: int, states: int) -> tuple[Tensors, Tensors]:
    """Leaves [T, H, ...] and the gradients of output and states. Keys of the delta rule have unit length."""
    random, dtype = draw(device, tokens + case["heads"]), getattr(torch, case["dtype"])
    heads, keys, values, variant = case["heads"], case["keys"], case["values"], case["variant"]
    q, k = random(tokens, case["key_heads"], keys), random(tokens, case["key_heads"], keys)
    v, do = random(tokens, heads, values), random(tokens, heads, values)
    k = F.normalize(k, dim=-1) if "delta" in variant else k
    leaves = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
    shapes = {
        "head": (heads,),
        "token": (tokens, heads),
        "channel": (tokens, heads, keys),
        "gated delta": (tokens, heads),
    }
    if variant in shapes:
        leaves["decay of heads" if variant == "head" else "decay"] = -0.05 * random(*shapes[variant]).abs()
    if "delta" in variant:
        leaves["beta"] = 2 * torch.sigmoid(random(tokens, heads))
    if states:
        leaves["initial"] = 3 * random(states, heads, keys, values)
    return leaves, {"o": do.to(dtype), "final": random(states, heads, keys, values)}


def attend_linear(case: Case, x: Tensors, backend: str) -> Tensors:
    """The output, and the states after the sequences where there are some before."""
    kind, decay = case["kind"], x.get("decay", x.get("decay of heads"))
    if kind == "phases":
        external = range(len(case["lengths"]))
        parts = segments(x["q"], x["k"], x["v"], decay, x.get("beta"), case["lengths"], external, backend=backend)
        maps = parts.segment_map()
        o = parts.apply(maps, parts.intra(), x["initial"])
        return {"o": o, "final": maps.state + carry(maps.transition, x["initial"].to(maps.state.dtype))}
    batch = 2 if kind == "batch" else 1
    split = {n: t if n in ("initial", "decay of heads") else t.unflatten(0, (batch, -1)) for n, t in x.items()}
    options: dict[str, Any] = dict(backend=backend, causal=kind != "both ways")
    if kind != "batch":
        options["cu_seqlens"] = cumulative(case["lengths"])
    if "initial" in x:
        options |= dict(initial_state=x["initial"], output_final_state=True)
    decay = split.get("decay", x.get("decay of heads"))
    o, final = linear_attention(split["q"], split["k"], split["v"], decay, split.get("beta"), **options)
    return {"o": o.flatten(0, 1)} | ({} if final is None else {"final": final})


def check_linear(case: Case, device: str) -> Case:
    if (
        case["kind"] == "large"
    ):  # nearly as it is timed; beside chunks in fp64, which the tests compare with the definition
        case = case | dict(lengths=(8192,), heads=8, key_heads=8)
    is_stateful = case["kind"] in ("pack", "phases", "causality", "large")
    lengths = case["lengths"]
    tokens = 2 * (sum(lengths) // 2) if case["kind"] == "batch" else sum(lengths)
    leaves, weights = linear_tensors(case, device, tokens, len(lengths) if is_stateful else 0)
    if case["kind"] == "causality":
        facts = bits_before(lambda x: attend_linear(case, x, "triton")["o"], leaves, lengths)
        return verdict({}, TOLERANCE[case["dtype"]], **facts)

    def run(backend: str, dtype: torch.dtype | None = None) -> Tensors:
        mine = fresh(leaves, dtype)
        return gradients(attend_linear(case, mine, backend), mine, weights)

    found, again = run("triton"), run("triton")
    wanted = run("chunked" if case["kind"] == "large" else "reference", torch.float64)
    found["o"] = spoil(case, found["o"])
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    same = case.get("fault") or all(torch.equal(found[name], again[name]) for name in found)
    return verdict(errors, TOLERANCE[case["dtype"]], **{"same bits again": bool(same)})


def spoil(case: Case, o: Tensor) -> Tensor:
    """A planted error in one number, if the case asks for it: to see that it is found."""
    if case.get("fault"):
        o = o.clone()
        o.flatten()[-1] += 1 + o.norm()
    return o


# ---- softmax attention


def check_softmax(case: Case, device: str) -> Case:
    random, dtype, width = draw(device, case["width"]), getattr(torch, case["dtype"]), case["width"]
    pairs = case["pairs"] if case["kind"] in ("causal", "full") else [(n, n) for n, _ in case["pairs"]]
    queries, keys = (sum(pair[i] for pair in pairs) for i in (0, 1))
    q, do = (random(queries, 8, width).to(dtype) for _ in range(2))
    k, v = (random(keys, 2, width).to(dtype) for _ in range(2))
    leaves, weights = {"q": q, "k": k, "v": v}, {"o": do}
    bounds = dict(cu_seqlens_q=cumulative(n for n, _ in pairs), cu_seqlens_k=cumulative(m for _, m in pairs))
    options: dict[str, Any] = bounds | dict(causal=case["kind"] != "full", window=case["window"])
    if case["kind"] == "merge":  # one sequence, in two parts
        options |= dict.fromkeys(bounds, torch.tensor([0, queries]))

    def run(x: Tensors, backend: str) -> tuple[Tensor, Tensor]:
        return softmax_attention(x["q"], x["k"], x["v"], **options, backend=backend)

    try:
        run(leaves, case["backend"])
    except ValueError as obstacle:
        if "cannot run here" not in str(obstacle):
            raise
        return {"status": "skipped", "error": str(obstacle)}
    if case["kind"] == "causality":
        facts = bits_before(lambda x: run(x, case["backend"])[0], leaves, [n for n, _ in pairs])
        return verdict({}, TOLERANCE[case["dtype"]], **facts)
    found: Tensors = {}
    wanted: Tensors = {}
    for into, backend, dtype in ((found, case["backend"], None), (wanted, "reference", torch.float64)):
        mine = fresh(leaves, dtype)
        o, lse = run(mine, backend)
        into |= gradients({"o": o}, mine, weights) | {"lse": lse}
    if case["kind"] == "merge":
        found = merged(leaves, do, case["backend"])
    found["o"] = spoil(case, found["o"])
    return verdict({name: error(found[name], wanted[name]) for name in wanted}, TOLERANCE[case["dtype"]])


def merged(x: Tensors, do: Tensor, backend: str) -> Tensors:
    """One causal sequence as a rank of a ring meets it: its own keys, then those before, added up call by call."""
    q, k, v = x.values()
    half, end, scale = len(q) // 2, len(q), q.shape[-1] ** -0.5
    own = [Tile(slice(0, half), slice(0, half), None, 0), Tile(slice(half, end), slice(half, end), None, 0)]
    o, lse = empty_result(q)
    totals = [torch.zeros_like(t, dtype=o.dtype) for t in (q, k, v)]
    calls = own, [Tile(slice(half, end), slice(0, half))]
    for tiles in calls:
        attend(q, k, v, tiles, o, lse, scale=scale, backend=backend)
    for tiles in calls:
        attend_backward(do, q, k, v, o, lse, tiles, *totals, scale=scale, backend=backend)
    return {"o": o, "lse": lse} | dict(zip(("d q", "d k", "d v"), totals, strict=True))


# ---- short convolution


def check_convolution(case: Case, device: str) -> Case:
    random, dtype, lengths, channels, width = draw(device, 5), getattr(torch, case["dtype"]), case["lengths"], 48, 4
    initial = random(len(lengths), width - 1, channels).to(dtype)
    taps = {"weight": random(channels, width).to(dtype), "bias": random(channels).to(dtype)}
    x, weights = random(sum(lengths), channels).to(dtype), {"o": random(sum(lengths), channels).to(dtype)}

    def run(t: Tensors, backend: str) -> Tensor:
        options: dict[str, Any] = dict(cu_seqlens=cumulative(lengths), initial=t["initial"], backend=backend)
        return short_convolution(t["x"], t["weight"], t["bias"], activation="silu", **options)

    if case["kind"] == "causality":
        fixed = taps | {"initial": initial}
        return verdict(
            {}, TOLERANCE[case["dtype"]], **bits_before(lambda t: run(t | fixed, case["backend"]), {"x": x}, lengths)
        )
    leaves, results = {"x": x, "initial": initial, **taps}, []
    for backend, wide in ((case["backend"], None), ("reference", torch.float64)):
        mine = fresh(leaves, wide)
        results.append(gradients({"o": run(mine, backend)}, mine, weights))
    found, wanted = results
    found["o"] = spoil(case, found["o"])
    return verdict({name: error(found[name], wanted[name]) for name in wanted}, TOLERANCE[case["dtype"]])


FAMILIES = {"linear": check_linear, "softmax": check_softmax, "convolution": check_convolution}


def run(case: Case) -> Case:
    poison()
    return FAMILIES[case["family"]](case, "cuda" if torch.cuda.is_available() else "cpu")
