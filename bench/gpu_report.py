"""Tables of what `bench/gpu.py` found, in Markdown."""

from collections.abc import Sequence
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


def _linear(cases: list[Case]) -> str:
    heads = [
        "case",
        "forward",
        "fla",
        "speed",
        "share",
        "both",
        "fla",
        "speed",
        "share",
        "busy",
        "fla",
        "MiB",
        "fla",
        "o apart",
        "",
    ]
    rows: list[list[Any]] = []
    for case in cases:
        if case["status"] != "measured":
            rows.append([case["name"], *["not measured"] * (len(heads) - 2), case.get("error")])
            continue
        mine, other = case["sides"]["lsys"], case["sides"].get("fla", {})
        row: list[Any] = [case["name"]]
        for part in ("forward", "both"):
            a, b = mine[f"{part} ms"], other.get(f"{part} ms")
            row += [a, b, ratio(b, a), mine[f"share of bound, {part}"]]
        row += [case["profile"].get(side, {}).get("busy ms") for side in ("lsys", "fla")]
        row += [mine["peak MiB"], other.get("peak MiB")]
        rows.append([*row, other.get("difference of o"), case["note"]])
    return table(heads, rows)


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
    heads = [
        "case",
        "forward",
        "fastest other",
        "",
        "speed",
        "share",
        "both",
        "fastest other",
        "",
        "speed",
        "share",
        "",
    ]
    rows: list[list[Any]] = []
    for case in cases:
        if case["status"] != "measured":
            rows.append([case["name"], *["not measured"] * (len(heads) - 2), case.get("error")])
            continue
        mine = case["sides"]["lsys"]
        row: list[Any] = [case["name"]]
        for part in ("forward", "both"):
            key = f"{part} ms"
            times = {name: side[key] for name, side in case["sides"].items() if name != "lsys"}
            best = min(times, key=lambda name: times[name], default=None)
            least = None if best is None else times[best]
            row += [mine[key], least, best, ratio(least, mine[key]), mine[f"share of bound, {part}"]]
        others = "; ".join(
            f"{n} {s['forward ms']:.4g}, {s['both ms']:.4g}" for n, s in case["sides"].items() if n != "lsys"
        )
        rows.append([*row, f"{others}. {case['note']}"])
    return table(heads, rows)


def train(cases: list[Case]) -> str:
    keys = ("tokens/s", "MFU %", "peak GiB", "first loss", "last loss", "tests")
    rows = [[c["name"], c["status"], *(c.get("found", {}).get(key) for key in keys), c.get("error")] for c in cases]
    return table(("run", "result", *keys, ""), rows)


TABLES = {"environment": environment, "correct": correct, "speed": speed, "train": train}


def markdown(sections: dict[str, list[Case]], smoke: bool) -> str:
    title = "# Smoke run: these numbers mean nothing" if smoke else "# On a GPU"
    return "\n\n".join([title, *(f"## {name}\n\n{TABLES[name](cases)}" for name, cases in sections.items())])
