"""A cluster of network namespaces on one machine (`launch/lab.sh`), and a run across it: `lsys bench lab`."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

import lsys.launch
from lsys.bench.signals import Signals, deaf
from lsys.config.overrides import Override

SCRIPT = Path(lsys.launch.__path__[0]) / "lab.sh"


class LabError(ValueError):
    """The lab cannot do what was asked; says why and what to do."""


class LabUnavailable(LabError):
    """This machine makes no lab: no root, no iproute2, or no network namespaces."""


class Lab:
    """A lab that is up: `nodes` network namespaces, each with an address of its own on eth0."""

    def __init__(self, name: str, nodes: int) -> None:
        self.name, self.nodes = name, nodes

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"LAB": self.name, "PYTHON": sys.executable}

    def command(self, *arguments: str) -> list[str]:
        return ["bash", str(SCRIPT), *arguments]

    def shell(self, *arguments: str) -> str:
        """The output of lab.sh with these arguments.

        Raises:
            LabError: it failed; with what it said.
        """
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, env=self.environment, timeout=60
        )
        if done.returncode:
            raise LabError(f"lab.sh {arguments[0]}: {(done.stderr or done.stdout).strip().removeprefix('lab.sh: ')}")
        return done.stdout

    def rate(self, rate: str, node: int | None = None) -> None:
        """Shape what every node sends, or one: as "100mbit"; "none" lifts it."""
        self.shell("rate", rate, *([] if node is None else [str(node)]))

    def bytes(self) -> list[tuple[int, int]]:
        """Sent and received by each node's interface since it was made."""
        rows = (line.split() for line in self.shell("bytes").splitlines())
        return [(int(sent), int(received)) for _, sent, received in rows]

    def start(self, logs: Path, arguments: Sequence[str], ranks: int, **variables: str) -> subprocess.Popen:
        """launch/run.sh with these arguments on every node; output in logs/nodeN.log. SIGTERM goes on to all of them."""
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "node0.log").write_bytes(b"")
        environment = self.environment | {"RANKS": str(ranks)} | variables
        # In a session of its own: a terminal's Ctrl-C is passed on once, by us.
        return subprocess.Popen(self.command("launch", str(logs), *arguments), env=environment, start_new_session=True)


@contextlib.contextmanager
def lab(nodes: int, rate: str = "none", slow: Mapping[int, str] | None = None, name: str = "") -> Iterator[Lab]:
    """A lab of so many nodes, their links shaped to `rate`, those in `slow` to theirs; it is taken down in every case.

    Raises:
        LabUnavailable: no root, no iproute2, or no network namespaces here.
        LabError: a rate that cannot be read, or a node that is not there.
    """
    it = Lab(name or f"lsys-lab-{os.getpid()}", nodes)
    for each in (rate, *(slow or {}).values()):
        if not re.fullmatch(r"[1-9][0-9]*(kbit|mbit|gbit)|none", each):
            raise LabError(f"a rate is a whole number of kbit, mbit or gbit, as 100mbit, or none; got {each!r}")
    if not 1 <= nodes <= 99 or any(not 0 <= node < nodes for node in slow or {}):
        raise LabError(f"a lab has 1 to 99 nodes, numbered from 0; got {nodes} and rates for {sorted(slow or {})}")
    _tell_leftovers()
    try:
        it.shell("up", str(nodes), rate)
    except (LabError, OSError) as error:
        raise LabUnavailable("; ".join(str(error).removeprefix("lab.sh up: ").splitlines())) from None
    except BaseException:
        _down(it)
        raise
    try:
        for node, own in (slow or {}).items():
            it.rate(own, node)
        yield it
    finally:
        _down(it)


def _tell_leftovers() -> None:
    """Labs whose process was killed: nobody else takes them down."""
    folder = Path("/run/netns")  # iproute2's
    for switch in folder.glob("lsys-lab-*-switch") if folder.is_dir() else ():
        name = switch.name.removesuffix("-switch")
        if not Path(f"/proc/{name.rpartition('-')[2]}").exists():
            print(f"a lab was left behind; remove it with  LAB={name} {SCRIPT} down", file=sys.stderr)


def _down(it: Lab) -> None:
    """Without being interrupted: what stays would stay for good."""
    with deaf():
        subprocess.run(it.command("down"), env=it.environment, start_new_session=True)


@dataclass(frozen=True)
class LabOptions:
    """Run across network namespaces on this machine, as if each were a node: `CONFIG` to train, or `-- PROGRAM` as torchrun takes it.

    Needs Linux, root and iproute2. Every key of the YAML is an option too, such as --parallel.context 2. The exit code is the job's.
    """

    config: Positional[str] = ""
    """YAML file of the run."""
    nodes: int = 2
    """Number of nodes."""
    ranks_per_node: int = 1
    """Ranks of each node."""
    rate: str = "none"
    """What each node may send: 1gbit, 100mbit, none."""
    slow: tuple[str, ...] = ()
    """Nodes with another rate, as 1:100mbit."""
    logs: Path = Path("runs/lab")
    """Folder for each node's output, nodeN.log."""
    restarts: int = 3
    """How often failed workers are started anew."""
    preflight: bool = True
    """Look at the nodes before the run starts."""


def main(options: LabOptions, overrides: Sequence[Override], program: Sequence[str]) -> int:
    """Bring the lab up, run, tell what the interfaces carried, take it down.

    Raises:
        LabError, ConfigError: before anything is made.
    """
    words = _program(options, overrides, program)
    slow = dict(map(_slow, options.slow))
    with Signals() as signals, lab(options.nodes, options.rate, slow) as it:
        if options.preflight:
            looks = options.logs / "preflight"
            looking = it.start(looks, ["--preflight-only", *words], options.ranks_per_node)
            if code := signals.wait(looking, looks / "node0.log"):
                return code
        before = it.bytes()
        flags = ["--no-preflight", "--restarts", str(options.restarts)]
        process = it.start(options.logs, [*flags, *words], options.ranks_per_node)
        code = signals.wait(process, options.logs / "node0.log")
        _tell(it, before, options.logs, code)
    return code


def run_in_lab(program: Sequence[str], nodes: int, ranks_per_node: int, rate: str, logs: Path, signals: Signals) -> int:
    """Run a program, as torchrun takes it (`-m MODULE ARGUMENTS`), across a lab, silently; the exit code.

    Raises:
        LabError: as `lab`.
    """
    with lab(nodes, rate) as it:
        return signals.wait(it.start(logs, ["--no-preflight", "--restarts", "0", "--", *program], ranks_per_node))


def _program(options: LabOptions, overrides: Sequence[Override], program: Sequence[str]) -> list[str]:
    """What launch/run.sh is to start, in its words."""
    for names, _ in overrides:
        if program or len(names) == 1:
            raise LabError(f"{'.'.join(names)!r} is no option; a program's own options come after --")
    if bool(options.config) == bool(program):
        raise LabError("name a YAML file to train, or a program after --, such as -- -m my_module; not both")
    if program:
        return ["--", *program]
    from lsys.config.load import load
    from lsys.config.rules import check

    load(options.config, overrides, lambda config: check(config, options.nodes * options.ranks_per_node))
    return [options.config, *(f"--{'.'.join(names)}={text}" for names, text in overrides)]


def _slow(text: str) -> tuple[int, str]:
    node, _, rate = text.partition(":")
    if not node.isdigit() or not rate:
        raise LabError(f"--slow takes NODE:RATE, as 1:100mbit; got {text!r}")
    return int(node), rate


def _tell(it: Lab, before: Sequence[tuple[int, int]], logs: Path, code: int) -> None:
    print(f"\n{'node':>4} {'sent MB':>12} {'received MB':>12}   output")
    for node, (then, now) in enumerate(zip(before, it.bytes(), strict=True)):
        sent, received = ((new - old) / 1e6 for new, old in zip(now, then, strict=True))
        print(f"{node:>4} {sent:>12,.3f} {received:>12,.3f}   {logs / f'node{node}.log'}")
    if code:
        print(f"the job ended with code {code}", file=sys.stderr)
