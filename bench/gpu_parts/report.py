"""Tables of what `bench/gpu.py` found, in Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

Case = dict[str, Any]


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell(x) for x in row)} |" for row in lines)


def cell(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.1e}" if x and abs(x) < 1e-3 else f"{x:.4g}"
    text = "" if x is None else " ".join(str(x).replace("|", "/").split())
    return text if len(text) < 600 else f"... {text[-600:]}"  # the end of an error says most


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def environment(cases: list[Case]) -> str:
    rows = [item for case in cases for item in case.get("found", {"machine": case.get("error")}).items()]
    return table(("", ""), rows)


def correct(cases: list[Case]) -> str:
    """Counts, then what failed, then all."""
    counts = {status: sum(case["status"] == status for case in cases) for status in ("passed", "failed", "skipped")}
    failed = [case for case in cases if case["status"] == "failed"]
    heads = ("case", "result", "worst error", "tolerance", "")

    def rows(some: list[Case]) -> list[list[Any]]:
        return [[c["name"], c["status"], c.get("worst"), c.get("tolerance"), c.get("error")] for c in some]

    parts = [", ".join(f"{count} {status}" for status, count in counts.items())]
    parts += [table(heads, rows(failed))] if failed else []
    return "\n\n".join([*parts, table(heads, rows(cases))])


def speed(cases: list[Case]) -> str:
    profiled = {case["name"]: case.get("sides", {}) for case in cases if case.get("profiled")}
    timed = [case | {"profile": profiled.get(case["name"], {})} for case in cases if not case.get("profiled")]
    softmax = [case for case in timed if case.get("family") == "softmax"]
    linear = [case for case in timed if case.get("family") != "softmax"]
    parts = [
        "Milliseconds. Speed: the other's time over ours. Share: of the bound.",
        _linear(linear),
        _softmax(softmax),
    ]
    return "\n\n".join(parts + ([_kernels(profiled)] if profiled else []))


def _beside(heads: Sequence[str], cases: list[Case], figures: Callable[[Case], list[Any]]) -> str:
    """A row of each case: its name and figures, or why there are none."""
    rows = []
    for case in cases:
        missing = [*["not measured"] * (len(heads) - 2), case.get("error")]
        rows.append([case["name"], *(figures(case) if case["status"] == "measured" else missing)])
    return table(heads, rows)


def _linear(cases: list[Case]) -> str:
    """Beside flash-linear-attention."""

    def figures(case: Case) -> list[Any]:
        mine, other, row = case["sides"]["lsys"], case["sides"].get("fla", {}), []
        for part in ("forward", "both"):
            a, b = mine[f"{part} ms"], other.get(f"{part} ms")
            row += [a, b, ratio(b, a), mine[f"share of bound, {part}"]]
        row += [case["profile"].get(side, {}).get("busy ms") for side in ("lsys", "fla")]
        return [*row, mine["peak MiB"], other.get("peak MiB"), other.get("difference of o"), case["note"]]

    each = ("fla", "speed", "share")
    heads = ("case", "forward", *each, "both", *each, "busy", "fla", "MiB", "fla", "o apart", "")
    return _beside(heads, cases, figures)


def _kernels(profiled: dict[str, Case]) -> str:
    """Where the time of one forward and backward of ours goes."""
    rows = [
        [name, kernel, milliseconds]
        for name, sides in profiled.items()
        for kernel, milliseconds in sides.get("lsys", {}).get("kernels", {}).items()
    ]
    return table(("case", "kernel", "ms"), rows)


def _softmax(cases: list[Case]) -> str:
    """Beside the fastest of the others, forward and in both passes, which need not be the same."""

    def figures(case: Case) -> list[Any]:
        others, row = dict(case["sides"]), []
        mine = others.pop("lsys")
        for part in ("forward", "both"):
            key = f"{part} ms"
            best = min(others, key=lambda name: others[name][key], default=None)
            least = None if best is None else others[best][key]
            row += [mine[key], least, best, ratio(least, mine[key]), mine[f"share of bound, {part}"]]
        said = "; ".join(f"{n} {s['forward ms']:.4g}, {s['both ms']:.4g}" for n, s in others.items())
        return [*row, f"{said}. {case['note']}"]

    each = ("fastest other", "", "speed", "share")
    return _beside(("case", "forward", *each, "both", *each, ""), cases, figures)


def train(cases: list[Case]) -> str:
    keys = ("tokens/s", "MFU %", "peak GiB", "first loss", "last loss", "tests")
    rows = [[c["name"], c["status"], *(c.get("found", {}).get(key) for key in keys), c.get("error")] for c in cases]
    return table(("run", "result", *keys, ""), rows)


TABLES = {"environment": environment, "correct": correct, "speed": speed, "train": train}


def markdown(sections: dict[str, list[Case]], smoke: bool) -> str:
    title = "# Smoke run: these numbers mean nothing" if smoke else "# On a GPU"
    return "\n\n".join([title, *(f"## {name}\n\n{TABLES[name](cases)}" for name, cases in sections.items())])
