"""How nodes meet: several in one process, each at a loopback address of its own; and the command alone."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lsys.launch import network
from lsys.launch.network import NetworkError, place, resolve
from lsys.launch.preflight import rendezvous
from lsys.launch.preflight.rendezvous import Host, Job, Meeting, attend
from lsys.launch.preflight.report import Report
from lsys.launch.preflight.transport import GREETING, LONGEST_LINE, Line, PeerError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def meet(
    nodes: int,
    *others: Callable[[Job], Coroutine[Any, Any, Any]],
    came: int | None = None,
    seconds: float = 10.0,
    own: str = "",
) -> tuple[Meeting, list[Any]]:
    """The host's meeting with so many nodes, and what they and others heard; with the host's own address, nodes have no numbers."""

    async def run() -> tuple[Meeting, list[Any]]:
        meetings: list[Meeting] = []

        def judge(meeting: Meeting) -> dict[str, Any]:
            meetings.append(meeting)
            return {"findings": [], "names": [], "summary": ""}

        host = Host(Job("127.0.0.1", 0, "secret", nodes, seconds), lambda: "", judge, lambda reports: None, own)
        await host.open()
        job = Job("127.0.0.1", host.port, "secret", nodes, seconds)
        here = [
            Report("box", f"127.0.0.{number + 1}", index=-1 if own else number)
            for number in range(nodes if came is None else came)
        ]
        guests = [asyncio.create_task(each(job)) for each in others]
        if guests:
            await asyncio.wait(guests, timeout=2.0)
        heard = [*(attend(job, report) for report in here), *guests]
        _, *answers = await asyncio.gather(host.lead(), *heard, return_exceptions=True)
        return meetings[0], answers

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_three_nodes_try_each_other():
    meeting, heard = meet(3)
    assert [answer["place"] for answer in heard] == [0, 1, 2]
    for number, report in enumerate(meeting.reports):
        others = {str(other) for other in range(3) if other != number}
        assert report.reach.keys() == others == report.rates.keys()
        assert all(isinstance(value, float) for value in (*report.reach.values(), *report.rates.values())), report
        assert abs(report.offset) < 0.5 and report.uncertainty < 0.5
    assert not meeting.lost and not meeting.strangers


def test_the_host_comes_first_whatever_its_address():
    meeting, heard = meet(3, own="127.0.0.2")
    assert [report.address for report in meeting.reports] == ["127.0.0.2", "127.0.0.1", "127.0.0.3"]
    assert [answer["place"] for answer in heard] == [1, 0, 2]


def test_one_node_alone():
    meeting, _ = meet(1)
    assert meeting.reports[0].reach == {} and meeting.reports[0].rates == {}


def test_another_jobs_node_is_refused():
    async def stranger(job: Job) -> None:
        await attend(Job(job.host, job.port, "another", 2, 5.0), Report("other", "127.0.0.9"))

    meeting, heard = meet(2, stranger)
    assert meeting.strangers == ["127.0.0.1"] and len(meeting.reports) == 2
    assert isinstance(heard[-1], PeerError) and "another job waits here" in str(heard[-1])


@pytest.mark.parametrize(
    "text", [b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"\x80\x04\x95", b'{"token": "secret"}\n{"report": 3}\n']
)
def test_what_strangers_send_does_no_harm(text: bytes):
    async def stranger(job: Job) -> None:
        _, writer = await asyncio.open_connection(job.host, job.port)
        writer.write(text)
        writer.close()

    meeting, _ = meet(2, stranger)
    assert len(meeting.reports) == 2 and not meeting.lost


def test_a_node_that_leaves_is_told():
    async def leaver(job: Job) -> None:
        line = Line(*await asyncio.open_connection(job.host, job.port, limit=LONGEST_LINE))
        assert (await line.receive())["hello"] == GREETING
        await line.ask(token=job.token)
        await line.send(report=Report("gone", "127.0.0.7", index=1, port=9).told())
        line.close()

    meeting, _ = meet(2, leaver, came=1)
    assert [address for address, _ in meeting.lost] == ["127.0.0.7"]
    assert isinstance(meeting.reports[0].reach["1"], str)


@pytest.mark.parametrize(
    "sent, told", [(b"", "the connection ended"), (b"[]\n", "is no preflight of lsys"), (b"", "no answer in 0 s")]
)
def test_what_comes_instead_of_an_answer_is_told(sent: bytes, told: str):
    async def read() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(sent)
        if "no answer" not in told:
            reader.feed_eof()
        await Line(reader, None).receive(0.01)  # type: ignore[arg-type]

    with pytest.raises(PeerError, match=told):
        asyncio.run(read())


@pytest.mark.parametrize("late, seen", [(0.4, True), (60.0, False)])
def test_a_file_that_a_network_file_system_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch, late: float, seen: bool
):
    """For 5 s, of a clock that goes faster here."""
    report, job = Report("a", "127.0.0.1", folder=str(tmp_path)), Job("127.0.0.1", 0, "secret", 1, 1.0)
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    async def look() -> dict[str, Any]:
        asyncio.get_running_loop().call_later(late, (tmp_path / "marker").touch)
        return await rendezvous._try_peers(job, report, None, [], 0, "marker")

    assert asyncio.run(look())["marker"] is seen


def test_a_report_of_another_version_is_refused_and_told():
    async def other(job: Job) -> Any:
        line = Line(*await asyncio.open_connection(job.host, job.port, limit=LONGEST_LINE))
        await line.receive()
        await line.ask(token=job.token)
        return await line.ask(report={"name": "old"})

    meeting, heard = meet(2, other)
    assert heard[-1] == {"refused": "another version of lsys is at the host"}
    assert meeting.lost == [("127.0.0.1", "not a report of this version of lsys")]


def test_the_host_goes_on_with_those_that_came():
    meeting, _ = meet(3, came=2, seconds=1.0)
    assert len(meeting.reports) == 2 and meeting.reports[0].reach.keys() == {"1"}


def test_a_host_that_does_not_answer_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(PeerError, match=f"the host 127.0.0.1:{port} does not answer in 0 s: Conn"):
            asyncio.run(attend(Job("127.0.0.1", port, "secret", 2, 0.4), Report("box", "127.0.0.1")))


def test_what_is_no_preflight_is_told():
    async def run() -> None:
        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(json.dumps(["hello"]).encode() + b"\n")

        server = await asyncio.start_server(other, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            await attend(Job("127.0.0.1", port, "secret", 2, 5.0), Report("box", "127.0.0.1"))
        finally:
            server.close()

    with pytest.raises(PeerError, match="no preflight of"):
        asyncio.run(run())


def test_place_on_the_network():
    here = place("127.0.0.1")
    assert here == ("127.0.0.1", "lo", "127.0.0.1") and here.is_host
    with pytest.raises(NetworkError, match="'eth99' has no IPv4 address; there are .*lo"):
        place("127.0.0.1", "eth99")
    with pytest.raises(NetworkError, match="has no IPv4 address here"):
        resolve("no-such-host.invalid")


def test_a_machines_own_name_is_not_taken_for_its_loopback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-0.cluster")
    monkeypatch.setattr(network, "_own_address", lambda there: {network.ELSEWHERE: "10.0.0.7"}[there])
    here = place("gpu-0")
    assert (here.host, here.address, here.is_host) == ("10.0.0.7", "10.0.0.7", True)
    with pytest.raises(NetworkError, match="'gpu-1' is 127.0.1.1 here, which is this node itself; give its address"):
        place("gpu-1")


def preflight(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lsys.launch.preflight", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_alone(tmp_path: Path):
    config, folder = str(QUICKSTART), tmp_path / "run"
    done = preflight(
        config, "--ranks", "2", "--train.folder", str(folder), "--data.corpora.0.path", str(tmp_path / "none")
    )
    assert done.returncode == 2 and done.stdout.startswith("preflight: 1 of 1 nodes x 2 ranks")
    assert f"{tmp_path}/none.bin not found; copy it there" in done.stderr and "2 findings" in done.stderr
    assert not folder.exists()  # what the preflight made is gone
    done = preflight("nope.yaml", "--ranks", "3")
    assert done.returncode == 2 and "nope.yaml cannot be read" in done.stderr


def test_the_command_without_a_configuration():
    done = preflight("--ranks", "2")
    assert done.returncode == 0 and done.stderr == ""


def test_a_taken_port_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = preflight("--port", port)
    assert done.returncode == 2 and f"cannot listen on port {port} of 127.0.0.1: " in done.stderr
    assert "take another --port" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--nodes", "2"], "several nodes need --host, --port and --job"), (["--fast"], "--fast is no option")],
)
def test_words_that_do_not_do(words: list[str], told: str):
    done = preflight(*words)
    assert done.returncode == 2 and told in done.stderr


def test_no_torch_is_imported():
    code = (
        "import sys, lsys.launch.preflight.__main__ as p; code = p.main(sys.argv[1:]);"
        "heavy = {'torch', 'megatron', 'numpy'} & sys.modules.keys(); sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(QUICKSTART)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
