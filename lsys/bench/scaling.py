"""`lsys bench scaling`: the same work on more and more ranks, and what becomes of a rank's speed."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from lsys.bench.signals import Signals
from lsys.config.load import load
from lsys.config.messages import ConfigError, Mistake
from lsys.config.modules import missing_modules
from lsys.config.overrides import Override
from lsys.config.rules import check, file_mistakes
from lsys.config.schema import Config
from lsys.observe.flops import training_flops
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan

WAYS = ("measured", "replay", "predicted")


class ScalingError(ValueError):
    """A sweep that cannot be run, or a point of it that failed."""


@dataclass(frozen=True)
class ScalingOptions:
    """Run a configuration on several numbers of ranks; draw a rank's speed over that of the first. Every key of the YAML is an option too."""

    config: Positional[Path]
    """YAML file of the run."""
    ranks: str = "1,2,4"
    """Numbers of ranks, ascending; the first is the baseline."""
    nodes: str = "1"
    """Nodes of each point, or one number for all."""
    scaling: Literal["weak", "strong"] = "weak"
    """weak: as many tokens a step for each rank; strong: as many in all."""
    axis: Literal["context", "data", "tensor", "pipeline"] = "context"
    """The degree that takes the ranks. On context, weak scaling makes micro-batches longer; else there are more of them."""
    steps: int = 30
    """Steps of each point; figures are medians of the reports but the first."""
    out: Path = Path("runs/scaling")
    """Folder for logs, figures, TensorBoard and the picture."""
    rate: str = ""
    """More nodes than one are a lab on this machine (root), with links of this rate, as 1gbit; none: unshaped."""
    launcher: str = ""
    """What starts the ranks elsewhere, with {ranks}, {nodes} and {ranks_per_node}; it gets `-m lsys.bench.point ...` after it."""
    hardware: str = ""
    """Predict each point on this hardware too, as lsys check does: a name such as h100x8, or the JSON of a calibration."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep. overrides: what its configuration has beside the user's."""

    ranks: int
    nodes: int
    overrides: tuple[Override, ...]

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes


def points(config: Config, options: ScalingOptions) -> list[Point]:
    """The runs of a sweep.

    Raises:
        ScalingError: numbers that do not ascend or do not fit together.
    """
    ranks, nodes = _numbers("--ranks", options.ranks), _numbers("--nodes", options.nodes)
    nodes = nodes * len(ranks) if len(nodes) == 1 else nodes
    if len(nodes) != len(ranks):
        raise ScalingError(f"--nodes names {len(nodes)} points, --ranks {len(ranks)}; give one number, or one for each")
    if sorted(set(ranks)) != ranks:
        raise ScalingError(f"--ranks {options.ranks} does not ascend; the first is the baseline, as in 1,2,4")
    found = []
    for n, over in zip(ranks, nodes, strict=True):
        if n % over:
            raise ScalingError(f"{n} ranks do not divide over {over} nodes; take a multiple")
        found.append(Point(n, over, tuple(_changes(config, options, n, ranks[0]))))
    return found


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise ScalingError(f"{name} {text!r} is no list of numbers; as in 1,2,4") from None
    if min(numbers) < 1:
        raise ScalingError(f"{name} {text!r} has numbers below 1")
    return numbers


def _changes(config: Config, options: ScalingOptions, ranks: int, first: int) -> list[Override]:
    """Degrees and sizes of a point, beside the first, which has the configuration's sizes."""
    if ranks % first:
        raise ScalingError(f"{ranks} ranks are no multiple of the first point's {first}")
    times, parallel, train = ranks // first, config.parallel, config.train
    wanted: dict[str, Any] = {}
    if options.axis != "data":
        wanted[f"parallel.{options.axis}"] = getattr(parallel, options.axis) * times
    if options.scaling == "weak":
        wanted["train.batch_tokens"] = train.batch_tokens * times
        if options.axis == "context":
            wanted["train.micro_batch_tokens"] = train.micro_batch_tokens * times
    folder = options.out / f"ranks-{ranks}"
    wanted |= {
        "train.folder": folder,
        "train.steps": options.steps,
        "train.validate_tokens": 0,
        "checkpoint.save": "false",
        "checkpoint.resume": "never",
        "metrics.every": max(1, options.steps // 6),
        "optimizer.warmup_steps": min(config.optimizer.warmup_steps, options.steps - 1),
        "optimizer.decay_steps": "null",
        "train.profile.first": 0,  # a trace would slow the run
    }
    return [Override(tuple(key.split(".")), str(value)) for key, value in wanted.items()]


def main(options: ScalingOptions, overrides: Sequence[Override]) -> int:
    """Run the sweep; refuse it whole if one of its points has mistakes.

    Raises:
        SystemExit: a signal stopped it, 128 and the signal's number.
    """
    config = load(options.config, overrides)
    sweep = points(config, options)
    _require_sound(options, overrides, sweep)
    predictions = [_predicted(options, overrides, point) for point in sweep]
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        raise ScalingError(f"--out {options.out} is not empty; name another folder, or remove it")
    results = []
    with Signals() as signals:
        for point, predicted in zip(sweep, predictions, strict=True):
            print(f"ranks {point.ranks}, nodes {point.nodes}", flush=True)
            _run(options, overrides, point, signals)
            results.append(_result(options, point) | {"predicted": predicted})
            new = options.out / "scaling.json.new"  # a signal may come within the writing
            new.write_text(json.dumps(_summary(options, results), indent=1) + "\n")
            new.replace(options.out / "scaling.json")
    from lsys.bench.scaling_report import report

    summary = _summary(options, results)
    Console(highlight=False, soft_wrap=True).print(table(summary))
    report(summary, options.out)
    return 0


def _require_sound(options: ScalingOptions, overrides: Sequence[Override], sweep: Sequence[Point]) -> None:
    """Every mistake of every point at once."""
    mistakes: dict[Mistake, None] = {}
    for point in sweep:

        def rules(config: Config, ranks: int = point.ranks) -> list[Mistake]:
            return check(config, ranks) + missing_modules(config) + file_mistakes(config)

        try:
            load(options.config, [*overrides, *point.overrides], rules)
        except ConfigError as error:
            mistakes |= dict.fromkeys(error.mistakes)
        if point.nodes > 1 and not (options.rate or options.launcher):
            raise ScalingError(
                f"{point.nodes} nodes: --rate makes a lab of them on this machine (root), --launcher says what starts them elsewhere"
            )
    if mistakes:
        raise ConfigError(list(mistakes))


def program(options: ScalingOptions, overrides: Sequence[Override], point: Point) -> list[str]:
    """What the ranks of a point run, as torchrun takes it."""
    words = ["-m", "lsys.bench.point", str(options.config)]
    for names, text in (*overrides, *point.overrides):
        words += [f"--{'.'.join(names)}", str(text)]
    return words


def launcher(options: ScalingOptions, point: Point) -> list[str]:
    """What starts them, where no lab does."""
    if options.launcher:
        numbers = {"ranks": point.ranks, "nodes": point.nodes, "ranks_per_node": point.ranks_per_node}
        return shlex.split(options.launcher.format(**numbers))
    torchrun = str(Path(sys.executable).parent / "torchrun")
    # The worker's module: torchrun gives each rank a session of its own, and one that is killed would leave them behind.
    return [torchrun, "--standalone", "--nproc-per-node", str(point.ranks), "-m", "lsys.launch.worker"]


def _run(options: ScalingOptions, overrides: Sequence[Override], point: Point, signals: Signals) -> None:
    """Raises ScalingError: the run failed. SystemExit: a signal stopped it."""
    folder, words = options.out / f"ranks-{point.ranks}", program(options, overrides, point)
    folder.mkdir()
    if point.nodes > 1 and not options.launcher:
        from lsys.bench.lab import run_in_lab

        code = run_in_lab(words, point.nodes, point.ranks_per_node, options.rate, folder, signals)
    else:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        environment.pop("LSYS_AGENT", None)  # another's: the agent is the torchrun that is started here
        with (folder / "log.txt").open("w") as log:
            command = [*launcher(options, point), *words]
            code = signals.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if signals.asked:
        name = signal.Signals(signals.asked).name
        print(f"lsys: {name} stopped the sweep on {point.ranks} ranks; {folder} has its logs", file=sys.stderr)
        raise SystemExit(128 + signals.asked)
    if code:
        raise ScalingError(f"the run on {point.ranks} ranks ended with code {code}; {folder} has its logs")


def _result(options: ScalingOptions, point: Point) -> dict[str, Any]:
    """What a point left behind: the run's record, and the replay of a step."""
    folder = options.out / f"ranks-{point.ranks}"
    measured, replay = folder / "scaling.json", folder / "replay.json"
    return {
        "ranks": point.ranks,
        "nodes": point.nodes,
        "shares_cores": _shares_cores(options, point),
        "measured": json.loads(measured.read_text()),
        "replay": json.loads(replay.read_text()) if replay.exists() else None,
    }


def _shares_cores(options: ScalingOptions, point: Point) -> bool:
    """Whether CPU ranks outnumber the cores: then wall-clock says what the cores do, not what the system does."""
    import torch

    here = point.ranks_per_node if options.launcher else point.ranks  # a lab's nodes are one machine
    return not torch.cuda.is_available() and here > (os.cpu_count() or 1)


def _predicted(options: ScalingOptions, overrides: Sequence[Override], point: Point) -> dict[str, Any] | None:
    """What `lsys check` would say of the point."""
    if not options.hardware:
        return None
    config = load(options.config, [*overrides, *point.overrides])
    machine = hardware(options.hardware, config.train.precision, cards=config.model.cards.values())
    machine = replace(machine, ranks_per_node=point.ranks_per_node)
    if not machine.is_known:
        raise ScalingError(f"--hardware {options.hardware} is not known well enough to predict times; leave it out")
    plan = Plan(config, point.ranks, machine)
    flops = training_flops(config.model, plan.deployment.documents) * config.micro_batches
    seconds, parts = plan.prediction.seconds, plan.prediction.parts
    return {"step_seconds": seconds, "flops": flops / seconds / point.ranks, "parts": parts}


def _summary(options: ScalingOptions, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything of the sweep, with efficiencies: of what was measured, replayed and predicted, each against its own first."""
    first = results[0]
    rows = []
    for result in results:
        ways = [way for way in WAYS if result[way] and first[way]]
        rows.append({**result, "efficiency": {way: result[way]["flops"] / first[way]["flops"] for way in ways}})
    said = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(options).items()}
    return {"options": said, "points": rows}


def table(summary: dict[str, Any]) -> Table:
    """A line for each point."""
    ways = [way for way in WAYS if way in summary["points"][0]["efficiency"]]
    heads = ["ranks", "nodes", *(f"{way} {what}" for way in ways for what in ("s/step", "efficiency"))]
    title = f"{summary['options']['scaling']} scaling over {summary['options']['axis']}, against the first line"
    shown = Table(*heads, title=title, title_justify="left")
    for point in summary["points"]:
        cells = []
        for way in ways:
            shares = " (shared cores)" if way == "measured" and point["shares_cores"] else ""
            cells += [f"{point[way]['step_seconds']:.4f}", f"{100 * point['efficiency'][way]:.1f}%{shares}"]
        shown.add_row(str(point["ranks"]), str(point["nodes"]), *cells)
    return shown
