"""The command: `python -m lsys.launch.preflight CONFIG --nodes N --host H --port P --job ID`, the same on every node."""

import argparse
import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsys.launch.network import NetworkError, Place, place
from lsys.launch.preflight import facts
from lsys.launch.preflight.finding import Finding, labels
from lsys.launch.preflight.judge import judge, missing_nodes, summary
from lsys.launch.preflight.rendezvous import Host, Job, Meeting, attend
from lsys.launch.preflight.report import Report
from lsys.launch.preflight.transport import PeerError

if TYPE_CHECKING:
    from lsys.config.schema import Config

REFUSED = 2


def options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and those that override keys of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m lsys.launch.preflight",
        description="Say what is wrong with the nodes of a job before it starts. Start it once on each node, with the same"
        " words; --section.key VALUE overrides the configuration, as for lsys train. Exit code 2: do not start.",
    )
    parser.add_argument("config", nargs="?", default="", help="YAML file of the run; none: look at the nodes only")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (1)")
    parser.add_argument("--ranks", type=int, default=1, help="ranks per node (1)")
    parser.add_argument("--host", default="127.0.0.1", help="name or address of the node where the others come to")
    parser.add_argument("--port", type=int, default=0, help="port of the job there; 0: any, for one node only")
    parser.add_argument("--job", default="", help="id of the job, the same on all nodes and known to nobody else")
    parser.add_argument("--interface", default="", help="network interface; else the one that leads to the host")
    parser.add_argument("--node", type=int, default=-1, help="number of this node, to name those that are missing")
    parser.add_argument("--hosts", default="", help="names or addresses of all nodes, with commas, to name the missing")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for all nodes (120)")
    found, rest = parser.parse_known_args(words)
    if rest and (not found.config or not rest[0].startswith("--") or "." not in rest[0]):
        parser.error(f"{rest[0]} is no option; keys of the configuration are --section.key VALUE, after its file")
    if found.nodes > 1 and not (found.job and found.port):
        parser.error("several nodes need --host, --port and --job, the same on each")
    return found, rest


def main(words: Sequence[str]) -> int:
    given, overrides = options(words)
    name = facts.host_name()
    try:
        here = place(given.host, given.interface)
    except NetworkError as error:
        problem, _, remedy = str(error).rpartition("; ")
        return _refuse([Finding((name,), problem, remedy)])
    report = Report(name, here.address, here.interface, index=given.node, nodes=given.nodes, ranks=given.ranks)
    settings = facts.gather(report, given.config, overrides)
    job = Job(here.host, given.port, given.job or secrets.token_hex(8), given.nodes, given.timeout)
    try:
        return asyncio.run(_meet(job, here, report, settings, [host for host in given.hosts.split(",") if host]))
    except KeyboardInterrupt:
        return 130


async def _meet(job: Job, here: Place, report: Report, settings: "Config | None", expected: Sequence[str]) -> int:
    if not here.is_host:
        try:
            return _tell_own(await attend(job, report, settings))
        except PeerError as error:
            remedy = "start the same command on the host, or look at the firewalls and routes between them"
            return _refuse([Finding((report.name,), str(error), remedy)])

    def verdict(meeting: Meeting) -> dict[str, Any]:
        found = judge(meeting, job.nodes, expected)
        return {
            "findings": [asdict(finding) for finding in found],
            "names": labels(meeting.reports),
            "summary": summary(meeting, job.nodes),
        }

    def waiting(reports: Sequence[Report]) -> None:
        absent = ", ".join(missing_nodes(reports, job.nodes, expected))
        text = f"preflight: {len(reports)} of {job.nodes} nodes are here; waiting"
        print(f"{text} for {absent}" if absent else text, file=sys.stderr, flush=True)

    with _marker(report.folder) as name:
        host = Host(job, lambda: name, verdict, waiting, report.address)
        try:
            await host.open()
        except OSError as error:
            problem = f"cannot listen on port {job.port} of {job.host}: {error.strerror}"
            return _refuse([Finding((report.name,), problem, "end what holds it (ss -ltnp), or take another --port")])
        leading = asyncio.create_task(host.lead())
        heard = asyncio.create_task(
            attend(Job(job.host, host.port, job.token, job.nodes, job.seconds), report, settings)
        )
        await asyncio.wait({leading, heard}, return_when=asyncio.FIRST_EXCEPTION)
        if heard.done() and isinstance(heard.exception(), PeerError):
            leading.cancel()
            remedy = "look at the host's own interface and firewall"
            return _refuse([Finding((report.name,), str(heard.exception()), remedy)])
        await leading
        message = heard.result()
    print(f"preflight: {message['summary']}", flush=True)
    return _refuse(_findings(message))


@contextlib.contextmanager
def _marker(folder: str) -> Iterator[str]:
    """A file of a random name in train.folder, as long as the nodes look for it; what was made for it is removed again."""
    path, made = Path(folder), False
    name = f".preflight-{secrets.token_hex(8)}"
    if folder:
        with contextlib.suppress(OSError):  # each node finds out itself that it cannot write there
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(f"{os.getpid()}\n")
    try:
        yield name if folder and (path / name).exists() else ""
    finally:
        if folder:
            with contextlib.suppress(OSError):
                (path / name).unlink(missing_ok=True)
                if made:
                    path.rmdir()


def _findings(message: dict[str, Any]) -> list[Finding]:
    return [Finding(**finding | {"hosts": tuple(finding["hosts"])}) for finding in message["findings"]]


def _tell_own(message: dict[str, Any]) -> int:
    """What concerns this node; the host prints everything."""
    found, own = _findings(message), message["names"][message["place"]]
    fatal = [finding for finding in found if not finding.warning]
    if fatal:
        mine = [finding for finding in found if own in finding.hosts]
        text = f"preflight: {own}: the host {message['names'][0]} tells all {len(found)} findings"
        print("\n  ".join([text, *map(str, mine)]), file=sys.stderr, flush=True)
    return REFUSED if fatal else 0


def _refuse(found: Sequence[Finding]) -> int:
    """Print findings; the exit code that follows from them."""
    if found:
        count = f"{len(found)} finding{'s' * (len(found) > 1)}"
        print("\n  ".join([f"preflight: {count}", *map(str, found)]), file=sys.stderr, flush=True)
    return REFUSED if any(not finding.warning for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
