"""What `lsys check` prints of memory, bytes and time."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from lsys.config.notices import notices
from lsys.parallel.gpus import words
from lsys.parallel.links import NETWORK, NODE
from lsys.predict.plan import Plan
from lsys.predict.search import Changes, nearest, overrides, search
from lsys.predict.seconds import AXES

GIB = 2**30


def report(plan: Plan, wants_search: bool = False) -> Iterator[Table | str]:
    """Tables and sentences, in the order in which they are to be printed."""
    yield memory(plan)
    yield from _fit(plan)
    yield _bytes(plan)
    if plan.hardware.is_known:
        yield _waterfall(plan)
        yield _run(plan)
    else:
        yield f"hardware {plan.hardware.name} is unknown: no times and no MFU; known are {', '.join(words())}"
    if wants_search:
        yield from _search(plan)


def memory(plan: Plan) -> Table:
    """GiB of a rank of each stage."""
    model = plan.config.model
    kinds = list(dict.fromkeys(model.layer_kinds))
    title = f"GiB of a rank, recompute {plan.config.train.recompute}; activations at their peak"
    alike = len({*model.channel_kinds}) == 1
    names = [f"{kind.mixer} layers" if alike else f"{kind.mixer}, {kind.channels} layers" for kind in kinds]
    headings = ["stage", "layers", "parameters", "gradients", "optimizer", *names, "other activations", "peak"]
    table = Table(*headings, title=title, title_justify="left")
    for stage, (held, peak, total) in enumerate(zip(plan.weights, plan.activations, plan.memory, strict=True)):
        chunks = (plan.deployment.kinds(stage, chunk) for chunk in range(plan.deployment.chunks))
        layers = " ".join(model.shortened(kind.mixer for kind in chunk) for chunk in chunks)
        sizes = (held.parameters, held.gradients, held.optimizer, *(peak.held.get(kind, 0.0) for kind in kinds))
        table.add_row(str(stage), _short(layers), *(_gib(size) for size in (*sizes, peak.rest, total)))
    return table


def _short(layers: str) -> str:
    many = len(layers.replace(",", " ").split()) if "," in layers else len(layers.replace(" ", ""))
    return layers if len(layers) <= 24 else f"{layers[:20]}... ({many})"


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"


def _fit(plan: Plan) -> Iterator[str]:
    room = plan.hardware.memory
    if room is None or plan.fits:
        return
    yield f"does not fit: {_gib(max(plan.memory))} GiB of {_gib(room)} that {plan.hardware.name} can give a rank"
    found = nearest(plan)
    if found is None:
        yield "no change of one or two of recompute, tensor, pipeline, context, micro_batch_tokens and distributed makes it fit"
    else:
        changes, other = found
        yield f"nearest that does ({_gib(max(other.memory))} GiB): {overrides(changes)}"


def _bytes(plan: Plan) -> Table:
    title = "MB that a rank receives in a step, of each axis the rank that receives most"
    table = Table("axis", "inside nodes", "across nodes", title=title, title_justify="left")
    most = plan.traffic()
    for axis in (*AXES, "world"):
        if axis in most:
            sizes = (most[axis].moved(axis, link) / 1e6 for link in (NODE, NETWORK))
            table.add_row(axis, *(f"{size:,.3f}" for size in sizes))
    return table


def _waterfall(plan: Plan) -> Table:
    prediction = plan.prediction
    title = f"predicted step on {plan.world_size} x {plan.hardware.name}"
    table = Table("part", "ms", "share", title=title, title_justify="left")
    for name, seconds in prediction.parts.items():
        if seconds >= 1e-6 or name == "compute":
            table.add_row(name, f"{1e3 * seconds:,.2f}", f"{prediction.percent[name]:.1f}%")
    table.add_row("step", f"{1e3 * prediction.seconds:,.2f}", "", style="bold")
    return table


def _run(plan: Plan) -> Table:
    train = plan.config.train
    unit = "GPU" if plan.hardware.gpu else "rank"
    table = Table("quantity", "value", title="predicted run", title_justify="left")
    table.add_row("MFU", "unknown" if plan.mfu is None else f"{100 * plan.mfu:.1f}%")
    table.add_row(f"tokens per second and {unit}", f"{plan.tokens_per_second:,.0f}")
    table.add_row(f"hours for {train.steps * train.batch_tokens:,} tokens", f"{plan.hours:,.1f}")
    table.add_row(f"{unit}-hours", f"{plan.hours * plan.world_size:,.0f}")
    return table


def _search(plan: Plan) -> Iterator[Table | str]:
    if not plan.hardware.is_known:
        yield "no search: it goes by predicted times"
        return
    found = search(plan.config, plan.world_size, plan.hardware)
    if not found:
        yield f"no degrees fit {plan.world_size} ranks of {plan.hardware.name}"
        return
    table = Table(title=f"fastest of {plan.world_size} ranks, predicted", title_justify="left")
    keys = list(dict.fromkeys(key for changes, _ in found for key in changes))
    for heading in (*(key.split(".")[1] for key in keys), "data", "GiB", "step ms", "MFU", "tokens/s"):
        table.add_column(heading)
    for changes, other in found:
        table.add_row(*_row(other, changes, keys))
    yield table
    best, other = found[0]
    yield f"overrides of the first: {overrides(_needed(plan, best))}".rstrip()
    for notice in notices(other.config, other.world_size):
        yield f"notice: {notice}"


def _row(plan: Plan, changes: Changes, keys: list[str]) -> list[str]:
    mfu = "" if plan.mfu is None else f"{100 * plan.mfu:.1f}%"
    figures = (str(plan.deployment.mesh.data), _gib(max(plan.memory)), f"{1e3 * plan.prediction.seconds:,.1f}", mfu)
    return [*(str(changes.get(key, "")) for key in keys), *figures, f"{plan.tokens_per_second:,.0f}"]


def _needed(plan: Plan, changes: Changes) -> Changes:
    """Those that differ from the configuration."""
    tree = plan.config.model_dump()
    return {key: value for key, value in changes.items() if tree[key.split(".")[0]][key.split(".")[1]] != value}
