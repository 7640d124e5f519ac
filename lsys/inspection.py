"""What `lsys check` and `lsys topology` print."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from lsys.config.corpora import corpus_notices
from lsys.config.load import config_hash, dump
from lsys.config.methods import attention_costs, attention_methods
from lsys.config.notices import notices
from lsys.config.rules import file_mistakes
from lsys.config.schema import Config
from lsys.observe.flops import flops_per_token, parameters, recompute_flops_per_token
from lsys.parallel.mesh import AXES, Mesh
from lsys.predict.hardware import Hardware
from lsys.predict.hardware import hardware as find_hardware
from lsys.predict.plan import Plan
from lsys.predict.report import memory, report


def print_check(
    config: Config, world_size: int, ranks_per_node: int, hardware: str | None = None, wants_search: bool = False
) -> None:
    """The resolved configuration and what follows from it. The configuration passes `lsys.config.rules.check`.

    Args:
        hardware: a name or a calibration's path (`lsys.predict.hardware`), which says how many ranks a node has, too.
        wants_search: propose the best degrees for this many ranks.

    Raises:
        ConfigError: `hardware` is neither.
    """
    machine = None
    if hardware:
        cards = config.model.cards.values()
        machine = find_hardware(hardware, config.train.precision, ranks_per_node, cards)
    ranks_per_node = machine.ranks_per_node if machine else ranks_per_node
    console = _console()
    mesh = Mesh.of(config.parallel, world_size)
    print(dump(config))
    print(f"# sha256 {config_hash(config)}\n")
    here = [f"on this machine: {mistake}" for mistake in file_mistakes(config)]
    for notice in [*notices(config, world_size), *corpus_notices(config), *here]:
        console.print(f"notice: {notice}")
    console.print(_grid(mesh), _parameters(config), _flops(config), _batches(config, mesh), sep="\n")
    if mesh.context > 1 and any(not card.has_state for card in config.model.cards.values()):
        nodes = mesh.nodes(ranks_per_node)
        console.print(*_attention(config, [nodes[rank] for rank in mesh.peers(0, "context")]), sep="\n")
    if machine is None:
        console.print(memory(Plan(config, world_size, Hardware("GPUs", ranks_per_node, gpu=True))))
        return
    for each in report(Plan(config, world_size, machine), wants_search):
        console.print(each)


def print_topology(config: Config, world_size: int, ranks_per_node: int) -> None:
    """One line per rank: node, coordinates, and the ranks it shares each axis with."""
    mesh = Mesh.of(config.parallel, world_size)
    nodes = mesh.nodes(ranks_per_node)
    axes = [axis for axis in AXES if mesh.degree(axis) > 1]
    table = Table("rank", "node", *axes, *(f"{axis} peers" for axis in axes))
    for rank in range(world_size):
        place = mesh.coordinates(rank)
        peers = [_ranks(mesh.peers(rank, axis)) for axis in axes]
        table.add_row(str(rank), str(nodes[rank]), *(str(place[axis]) for axis in axes), *peers)
    console = _console()
    console.print(table)
    for axis in axes:
        spanned = max(len({nodes[peer] for peer in mesh.peers(rank, axis)}) for rank in range(world_size))
        where = "inside a node" if spanned == 1 else f"over {spanned} nodes"
        console.print(f"{axis} {mesh.degree(axis)}: {where}")


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=160)


def _ranks(ranks: Sequence[int], limit: int = 8) -> str:
    shown = list(map(str, ranks))
    return " ".join(shown if len(shown) <= limit else [*shown[:3], "...", shown[-1]])


def _grid(mesh: Mesh) -> Table:
    table = Table(
        "axis",
        "degree",
        "stride",
        "peers of rank 0",
        title=f"{mesh.world_size} ranks, tensor fastest",
        title_justify="left",
    )
    for axis in AXES:
        table.add_row(axis, str(mesh.degree(axis)), str(mesh.stride(axis)), _ranks(mesh.peers(0, axis)))
    return table


def _parameters(config: Config) -> Table:
    parts = parameters(config.model)
    table = Table("part", "parameters", "share", title="parameters", title_justify="left")
    total = sum(parts.values())
    for part, count in parts.items():
        table.add_row(part, f"{count:,}", f"{100 * count / total:.1f}%")
    table.add_row("total", f"{total:,}", "", style="bold")
    return table


def _flops(config: Config) -> Table:
    """Forward FLOPs per token, for a document as long as a micro-batch (the most) and for short documents."""
    lengths = sorted({min(4096, config.train.micro_batch_tokens), config.train.micro_batch_tokens})
    kinds = [flops_per_token(config.model, length) for length in lengths]
    headings = [f"documents of {length:,}" for length in lengths]
    table = Table("part", *headings, title="forward MFLOPs per token, all layers of a kind", title_justify="left")

    def row(name: str, values: Sequence[float], style: str = "") -> None:
        table.add_row(name, *(f"{value / 1e6:,.3f}" for value in values), style=style)

    for part in kinds[0]:
        row(part, [kind[part] for kind in kinds])
    totals = [sum(kind.values()) for kind in kinds]
    row("forward", totals, "bold")
    row("training (3 x forward)", [3 * total for total in totals], "bold")
    recompute = config.train.recompute
    if recompute != "none":
        row(
            f"recompute ({recompute})",
            [recompute_flops_per_token(config.model, length, recompute) for length in lengths],
        )
    return table


def _attention(config: Config, node_of_rank: list[int]) -> Iterator[Table]:
    """What one layer of softmax attention communicates by each method, and which is taken."""
    taken = attention_methods(config, node_of_rank)
    for kind, rows in attention_costs(config, node_of_rank).items():
        title = f"{kind} layers over {len(node_of_rank)} context ranks on {len(set(node_of_rank))} nodes: received in one layer"
        title += f", forward and backward, by a document of {config.train.micro_batch_tokens:,}"
        headings = ["MB inside nodes", "MB across nodes", "MB of the busiest rank", "steps", "estimated ms", "note"]
        table = Table("method", *headings, title=title, title_justify="left")
        for row in rows:
            sizes = (f"{size / 1e6:,.2f}" for size in (row.same_node, row.across_nodes, row.most))
            how = "" if row.method != taken[kind] else "taken" if row.chosen else "taken as configured"
            note = "; ".join(filter(None, (how, row.note)))
            table.add_row(row.method, *sizes, str(row.steps), f"{1e3 * row.seconds:,.3f}", note)
        yield table


def _batches(config: Config, mesh: Mesh) -> Table:
    train = config.train
    share = -(-train.micro_batch_tokens // mesh.context)
    slots = -(-share // mesh.tensor) * mesh.tensor
    table = Table("quantity", "value", title="batches", title_justify="left")
    for name, value in {
        "tokens per step": train.batch_tokens,
        "tokens per micro-batch": train.micro_batch_tokens,
        "token slots per rank and micro-batch": slots,
        "micro-batches per step": config.micro_batches,
        "micro-batches per replica (accumulation)": config.micro_batches // mesh.data,
        "steps": train.steps,
        "tokens of the run": train.steps * train.batch_tokens,
    }.items():
        table.add_row(name, f"{value:,}")
    return table
