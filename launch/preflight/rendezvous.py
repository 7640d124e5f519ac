"""How the nodes of a job meet: one of them, the host, listens; the others come, try each other, and hear its verdict."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lsys.launch.preflight import facts, transport
from lsys.launch.preflight.report import Report
from lsys.launch.preflight.transport import ANSWER_SECONDS, GREETING, LONGEST_LINE, Line, PeerError, Probes, connect

if TYPE_CHECKING:
    from lsys.config.schema import Config

MOST_ROUNDS = 7  # each node measures its rate with as many others: all of eight nodes, a sample of more


@dataclass(frozen=True)
class Job:
    """What the nodes must agree on beforehand to meet.

    Attributes:
        host, port: where the host listens. token: tells this job's nodes from strangers. nodes: how many there are.
        seconds: how long the host waits for them, and they for it.
    """

    host: str
    port: int
    token: str
    nodes: int
    seconds: float


@dataclass
class Guest:
    """A node at the host's table. `lost`: why it is not there any more."""

    line: Line
    report: Report
    lost: str = ""


@dataclass
class Meeting:
    """What the host knows at the end: reports in order, who went away and why, addresses that came with another token."""

    reports: list[Report] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    seconds: float = 0.0


Judge = Callable[[Meeting], dict[str, Any]]


class Host:
    """The host's side. `marker` writes the marker file and gives its name; `say` tells what is waited for; `own`: its address."""

    def __init__(
        self,
        job: Job,
        marker: Callable[[], str],
        judge: Judge,
        say: Callable[[Sequence[Report]], None],
        own: str = "",
    ) -> None:
        self.job, self.marker, self.judge, self.say, self.own = job, marker, judge, say, own
        self.guests: list[Guest] = []
        self.meeting = Meeting()
        self.complete = asyncio.Event()

    async def open(self) -> None:
        """Listen on the job's port. Raises OSError: it is taken, or the address is not this node's."""
        self.server = await asyncio.start_server(self._welcome, self.job.host, self.job.port, limit=LONGEST_LINE)
        self.port: int = self.server.sockets[0].getsockname()[1]

    async def lead(self) -> None:
        """Wait for the nodes, have them try each other, and tell them the verdict."""
        try:
            await self._wait()
            self.complete.set()  # who comes now comes too late
            self.guests.sort(key=self._order)
            began = time.perf_counter()
            await self._reach()
            self.meeting.reports = [guest.report for guest in self.guests]
            await self._measure()
            self.meeting.seconds = time.perf_counter() - began
            verdict = self.judge(self.meeting)
            await asyncio.gather(*(self._tell(guest, verdict) for guest in self.guests))
        finally:
            self.server.close()

    def _order(self, guest: Guest) -> tuple[int, ...]:
        """The host comes first, as rules take for granted; the others by their numbers, or addresses."""
        report = guest.report
        return (report.address != self.own, report.index, *map(int, report.address.split(".")))

    async def _wait(self) -> None:
        end = time.monotonic() + self.job.seconds
        while not self.complete.is_set() and (left := end - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self.complete.wait(), min(left, 10.0))
            except TimeoutError:
                self.say([guest.report for guest in self.guests])

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        transport.no_delay(writer)
        try:
            await line.send(hello=GREETING)
            message = await line.receive()
            if not transport.same_token(message.get("token"), self.job.token):
                self.meeting.strangers.append(line.peer)
                await line.send(refused="another job waits here; give every node the same job id, or take another port")
                return line.close()
            message = await line.ask(welcome=True)
            while "time" in message:
                message = await line.ask(time=time.time())
            report = self._checked(line.peer, message.get("report"))
            if report is None or self.complete.is_set():
                why = "the preflight has begun without it" if report else "another version of lsys is at the host"
                await line.send(refused=why)
                return line.close()
        except PeerError:
            return line.close()
        self.guests.append(Guest(line, report))
        if len(self.guests) == self.job.nodes:
            self.complete.set()

    async def _reach(self) -> None:
        """Every node tries every other, and looks at train.folder, where the host has written by now."""
        table = [[guest.report.address, guest.report.port] for guest in self.guests]
        marker = self.marker()

        async def one(place: int, guest: Guest) -> None:
            answer = await self._ask(guest, peers=table, place=place, marker=marker)
            guest.report = self._checked(guest.report.address, guest.report.told() | answer) or guest.report

        await asyncio.gather(*(one(place, guest) for place, guest in enumerate(self.guests)))

    async def _measure(self) -> None:
        """Rates between pairs, one direction after the other, no node in two pairs at once."""

        async def one(sender: int, receiver: int) -> None:
            guest, key = self.guests[sender], str(receiver)
            if isinstance(guest.report.reach.get(key), float) and not self.guests[receiver].lost:
                guest.report.rates[key] = (await self._ask(guest, measure=receiver)).get("rate", "no answer")

        for pairs in rounds(len(self.guests))[:MOST_ROUNDS]:
            await asyncio.gather(*(one(first, second) for first, second in pairs))
            await asyncio.gather(*(one(second, first) for first, second in pairs))

    def _checked(self, address: str, told: Any) -> Report | None:
        """A node's report; None, and a note, if it is none."""
        try:
            return Report.heard(told)
        except ValueError as error:
            self.meeting.lost.append((address, str(error)))
            return None

    async def _ask(self, guest: Guest, **message: Any) -> dict[str, Any]:
        if guest.lost:
            return {}
        try:
            return await guest.line.ask(ANSWER_SECONDS, **message)
        except PeerError as error:
            guest.lost = str(error)
            self.meeting.lost.append((guest.report.address, guest.lost))
            return {}

    async def _tell(self, guest: Guest, verdict: dict[str, Any]) -> None:
        """The verdict; then the guest hangs up, which leaves the port free at once."""
        try:
            await guest.line.send(**verdict)
            await guest.line.receive(2.0)
        except PeerError:
            pass
        guest.line.close()


async def attend(job: Job, report: Report, settings: "Config | None" = None) -> dict[str, Any]:
    """A node's side: the host's verdict, and this node's `place` in its list. With `settings` it looks at the checkpoints that they begin with.

    Raises:
        PeerError: the host does not answer, refuses this node, or went away; says why.
    """
    probes = Probes(job.token)
    try:
        report.port = await probes.open(report.address)
    except OSError as error:
        raise PeerError(f"this node cannot listen on {report.address}: {error.strerror}") from None
    line = await _knock(job)
    try:
        report.offset, report.uncertainty = await transport.clock_offset(line)
        await line.send(report=report.told())
        message, place = await line.receive(job.seconds + ANSWER_SECONDS), 0
        while "findings" not in message:
            if "refused" in message:
                raise PeerError(f"{job.host}:{job.port} refuses this node: {message['refused']}")
            if "peers" in message:
                peers, place = message["peers"], message["place"]
                await line.send(**await _try_peers(job, report, settings, peers, place, message["marker"]))
            else:
                there, at = peers[message["measure"]]
                rate = await _or_why(transport.rate(there, at, report.address, job.token))
                await line.send(rate=rate)
            message = await line.receive(job.seconds + ANSWER_SECONDS)
        return message | {"place": place}
    finally:
        line.close()
        probes.close()


async def _knock(job: Job) -> Line:
    """A line to the host of this job, which may start later than this node."""
    end = time.monotonic() + job.seconds
    while True:
        try:
            line = await connect(job.host, job.port, "")
            break
        except PeerError as error:
            if time.monotonic() > end:
                raise PeerError(
                    f"the host {job.host}:{job.port} does not answer in {job.seconds:.0f} s: {error}"
                ) from None
            await asyncio.sleep(0.2)
    hello = await line.receive(5.0)
    if hello.get("hello") != GREETING:
        raise PeerError(f"what answers at {job.host}:{job.port} is no preflight of this version of lsys")
    answer = await line.ask(token=job.token)
    if "refused" in answer:
        raise PeerError(f"{job.host}:{job.port} refuses this node: {answer['refused']}")
    return line


async def _try_peers(
    job: Job, report: Report, settings: "Config | None", peers: list[tuple[str, int]], place: int, marker: str
) -> dict[str, Any]:
    others = [number for number in range(len(peers)) if number != place]
    tried = await asyncio.gather(
        *(
            _or_why(transport.round_trip(there, at, report.address, job.token))
            for there, at in (peers[i] for i in others)
        )
    )
    facts.look_at_folder(report, marker)
    end = time.monotonic() + 5.0  # a network file system may show a new file late
    while not report.marker and time.monotonic() < end:
        await asyncio.sleep(0.25)
        facts.look_at_folder(report, marker)
    facts.look_at_checkpoints(report, settings)
    reach = {str(number): result for number, result in zip(others, tried, strict=True)}
    return {"reach": reach} | {name: getattr(report, name) for name in ("free", "kept", "marker", "error", "mistakes")}


async def _or_why(trial: Awaitable[float]) -> float | str:
    try:
        return await trial
    except PeerError as error:
        return str(error)


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of so many, in rounds in which nobody is in two pairs (a round-robin tournament by the circle method)."""
    circle = [*range(count), *([-1] if count % 2 else [])]
    made = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        made.append([(min(pair), max(pair)) for pair in pairs if -1 not in pair])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return made
