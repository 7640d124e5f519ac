"""The commands. Only those that need torch and Megatron import them, so `--help` and `check` answer at once."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from lsys.config.messages import Mistake
    from lsys.config.overrides import Override
    from lsys.config.schema import Config

T = TypeVar("T")

LINGER = 2.0  # s that other ranks leave the first one to say why
HELP = ("-h", "--help", "help")
GROUPS = ("data", "bench")  # commands of two words

USAGE = """usage: lsys COMMAND ...

  train CONFIG                        train, under torchrun or alone
  check CONFIG --world-size N         every mistake of a configuration, or what it resolves to: ranks, parameters, FLOPs
  topology CONFIG --world-size N      who is whose peer on which axis
  generate CHECKPOINT --prompt TEXT   go on from a prompt, token by token
  data prepare INPUT ... --out PATH   make a corpus from text
  data inspect PATH                   look into a corpus
  bench scaling CONFIG --ranks 1,2,4  the same work on more and more ranks: efficiency, waterfall, a picture
  bench trace PATH                    what traces say about communication and its overlap
  bench lab CONFIG --nodes N          train across network namespaces on this machine, over links of any speed

`lsys COMMAND --help` lists a command's options. Every key of the YAML is one too: --parallel.tensor 2.
`--debug` shows the traceback of a refusal.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 2 for a mistake of the user, 1 for a file that the system refuses, all without traceback; a run that
    stopped has one of its own (docs/launch.md)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in HELP or (words[0] in GROUPS and (len(words) == 1 or words[1] in HELP)):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from lsys import __version__

        print(f"lsys {__version__}")
        return 0
    name = " ".join(words[:2]) if words[0] in GROUPS else words[0]
    if name not in COMMANDS:
        print(f"lsys: {name!r} is no command; {_similar(name)}there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](words[len(name.split()) :])
    except ValueError as error:
        if debug or not type(error).__module__.startswith("lsys"):
            raise
        _refuse(error)
        return int(getattr(error, "exit_code", 2))
    except OSError as error:
        if debug or error.filename is None or error.strerror is None:
            raise
        _refuse(FileProblem(f"{error.filename}: {error.strerror}; --debug shows what it was wanted for"))
        return 1


class FileProblem(ValueError):
    """A file or folder that the system refuses."""


def _similar(name: str) -> str:
    """`did you mean train? `, or nothing."""
    from difflib import get_close_matches

    words = {word: command for command in COMMANDS for word in (command, command.split()[-1])}
    found = get_close_matches(name, words, n=1, cutoff=0.6)
    return f"did you mean {words[found[0]]}? " if found else ""


def _refuse(error: ValueError) -> None:
    """Print an error: once where every rank has the same one (`everywhere`), or every rank of a node (`on_node`), else with the rank's number."""
    from lsys.runtime.environment import LaunchError, launch_from_environment

    try:
        launch = launch_from_environment()
    except LaunchError as unreadable:
        print(f"lsys: {unreadable}", file=sys.stderr)
        return
    everywhere = getattr(error, "everywhere", False)
    first = not (launch.rank or getattr(error, "number", 0))
    if (everywhere and not first) or launch.local_rank and getattr(error, "on_node", False):
        if launch.is_torchrun:  # it ends all ranks once one has ended, and only the first one speaks
            time.sleep(LINGER)
        return
    who = f"lsys, rank {launch.rank}" if launch.world_size > 1 and not everywhere else "lsys"
    lines = str(error).splitlines() or [type(error).__name__]
    text = f"{who}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{who}: {len(lines)} mistakes", *lines])
    print(text, file=sys.stderr, flush=True)


def _with_overrides(kind: type[T], command: str, words: list[str]) -> "tuple[T, list[Override]]":
    from lsys.config.overrides import parse
    from lsys.runtime.environment import launch_from_environment

    return parse(kind, words, prog=f"lsys {command}", quiet=launch_from_environment().rank > 0)


def _options(kind: type[T], command: str, words: list[str]) -> T:
    import tyro

    return tyro.cli(kind, args=words, prog=f"lsys {command}", description=kind.__doc__)


def _train(words: list[str]) -> int:
    from lsys.checkpoint import choice
    from lsys.config.corpora import corpus_notices
    from lsys.config.load import load
    from lsys.config.rules import check, file_mistakes
    from lsys.options import TrainOptions
    from lsys.runtime.environment import launch_from_environment, require_launcher
    from lsys.runtime.job import job_from_environment
    from lsys.train.stopped import refuse_restart

    require_launcher()
    options, overrides = _with_overrides(TrainOptions, "train", words)
    launch = launch_from_environment()

    def rules(config: "Config") -> "list[Mistake]":
        refuse_restart(
            config.train.folder, job_from_environment()
        )  # before what else is wrong: the same sentence each time
        return check(config, launch.world_size) + file_mistakes(config) + choice.mistakes(config)

    config = load(options.config, overrides, rules)
    for notice in corpus_notices(config) if launch.rank == 0 else ():
        print(f"notice: {notice}", file=sys.stderr, flush=True)
    from lsys.train.run import main as train

    return train(config)


def _check(words: list[str]) -> int:
    from lsys.checkpoint import choice
    from lsys.config.load import load
    from lsys.config.messages import Mistake
    from lsys.config.modules import missing_modules
    from lsys.config.rules import check, file_mistakes
    from lsys.inspection import print_check
    from lsys.options import CheckOptions

    options, overrides = _with_overrides(CheckOptions, "check", words)

    blind = []
    if options.search and not options.hardware:
        blind = [
            Mistake("", "--search goes by predicted times, which need --hardware", "add --hardware h100x8, or yours")
        ]

    def rules(config: "Config") -> "list[Mistake]":
        files = file_mistakes(config) + choice.mistakes(config) if options.files else []
        return [*check(config, options.world_size), *missing_modules(config), *files, *blind]

    config = load(options.config, overrides, rules)
    print_check(config, options.world_size, options.ranks_per_node, options.hardware, options.search)
    return 0


def _topology(words: list[str]) -> int:
    from lsys.config.load import load
    from lsys.config.rules import check
    from lsys.inspection import print_topology
    from lsys.options import TopologyOptions

    options, overrides = _with_overrides(TopologyOptions, "topology", words)
    config = load(options.config, overrides, lambda config: check(config, options.world_size))
    print_topology(config, options.world_size, options.ranks_per_node)
    return 0


def _generate(words: list[str]) -> int:
    from lsys.generate import GenerateOptions
    from lsys.generate import main as generate

    return generate(_options(GenerateOptions, "generate", words))


def _prepare(words: list[str]) -> int:
    from lsys.data.prepare import PrepareArgs, prepare

    prepare(_options(PrepareArgs, "data prepare", words))
    return 0


def _inspect(words: list[str]) -> int:
    from lsys.data.inspect import InspectArgs, inspect

    inspect(_options(InspectArgs, "data inspect", words))
    return 0


def _bench_lab(words: list[str]) -> int:
    from lsys.bench.lab import LabOptions, main

    end = words.index("--") if "--" in words else len(words)
    options, overrides = _with_overrides(LabOptions, "bench lab", words[:end])
    return main(options, overrides, words[end + 1 :])


def _bench_scaling(words: list[str]) -> int:
    from lsys.bench.scaling import ScalingOptions, main

    return main(*_with_overrides(ScalingOptions, "bench scaling", words))


def _bench_trace(words: list[str]) -> int:
    from lsys.bench.trace import TraceOptions, main

    return main(_options(TraceOptions, "bench trace", words))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "check": _check,
    "topology": _topology,
    "generate": _generate,
    "data prepare": _prepare,
    "data inspect": _inspect,
    "bench lab": _bench_lab,
    "bench scaling": _bench_scaling,
    "bench trace": _bench_trace,
}
