"""JSON lines over TCP, and what a node measures by them: clock, round trip, rate."""

import asyncio
import hmac
import json
import socket
import statistics
import time
from typing import Any

GREETING = "lsys preflight 1"
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 30.0
LONGEST_LINE = 1 << 22
FIRST_BYTES, MOST_BYTES, RATE_SECONDS = 1 << 17, 1 << 26, 0.2


class PeerError(Exception):
    """The other side cannot be reached, went away, or does not speak as it should; says which."""


class Line:
    """A connection that carries one JSON object per line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @property
    def peer(self) -> str:
        return (self.writer.get_extra_info("peername") or ("?",))[0]

    async def send(self, **message: Any) -> None:
        try:
            self.writer.write(json.dumps(message).encode() + b"\n")
            await self.writer.drain()
        except OSError as error:
            raise PeerError(f"the connection broke ({error.strerror or error})") from None

    async def receive(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """The next object.

        Raises:
            PeerError: none came in time, the connection ended, or it is no object.
        """
        try:
            text = await asyncio.wait_for(self.reader.readline(), seconds)
        except TimeoutError:
            raise PeerError(f"no answer in {seconds:.0f} s") from None
        except (OSError, ValueError) as error:  # ValueError: the line is too long
            raise PeerError(f"the connection broke ({error})") from None
        if not text:
            raise PeerError("the connection ended")
        try:
            message = json.loads(text)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise PeerError("what answers there is no preflight of lsys")
        return message

    async def ask(self, seconds: float = ANSWER_SECONDS, **message: Any) -> dict[str, Any]:
        await self.send(**message)
        return await self.receive(seconds)

    def close(self) -> None:
        self.writer.close()


async def connect(host: str, port: int, address: str) -> Line:
    """A line from this node's `address`, or from whichever leads there.

    Raises:
        PeerError: nobody answers; says why.
    """
    own = (address, 0) if address else None
    opening = asyncio.open_connection(host, port, local_addr=own, limit=LONGEST_LINE)
    try:
        reader, writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
    except TimeoutError:
        raise PeerError(f"no answer in {CONNECT_SECONDS:.0f} s") from None
    except OSError as error:
        raise PeerError((error.strerror or str(error)).split(" [")[0]) from None
    no_delay(writer)
    return Line(reader, writer)


def no_delay(writer: asyncio.StreamWriter) -> None:
    if (link := writer.get_extra_info("socket")) is not None:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def same_token(given: object, token: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), token.encode())


async def clock_offset(line: Line, rounds: int = 8) -> tuple[float, float]:
    """This clock less the other side's, and within what: by the shortest of some round trips."""
    best = (float("inf"), 0.0)
    for _ in range(rounds):
        before = time.time()
        there = (await line.ask(time=True)).get("time")
        after = time.time()
        if not isinstance(there, float):
            raise PeerError("what answers there is no preflight of lsys")
        best = min(best, (after - before, (before + after) / 2 - there))
    return best[1], best[0] / 2


class Probes:
    """What other nodes try this node by: a listener that answers lines and swallows bytes."""

    def __init__(self, token: str) -> None:
        self.token = token

    async def open(self, address: str) -> int:
        """Listen on a free port of the address; the port."""
        self.server = await asyncio.start_server(self._serve, address, 0, limit=LONGEST_LINE)
        return self.server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(reader, writer)
        no_delay(writer)
        try:
            while same_token((message := await line.receive()).get("token"), self.token):
                size = message.get("bytes", 0)
                began, left = time.perf_counter(), min(size, MOST_BYTES) if isinstance(size, int) else 0
                while left > 0 and (part := await reader.read(min(left, 1 << 20))):
                    left -= len(part)
                await line.send(seconds=time.perf_counter() - began)
        except PeerError:
            pass
        finally:
            line.close()


async def round_trip(host: str, port: int, address: str, token: str) -> float:
    """Seconds of a message and its answer, the median of a few."""
    line = await connect(host, port, address)
    try:
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            await line.ask(CONNECT_SECONDS, token=token)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)
    finally:
        line.close()


async def rate(host: str, port: int, address: str, token: str) -> float:
    """Bytes per second that one stream carries to a node: as many bytes as take a fifth of a second, or 64 MiB."""
    line = await connect(host, port, address)
    try:
        found, size = 0.0, FIRST_BYTES
        for _ in range(2):
            began = time.perf_counter()
            await line.send(token=token, bytes=size)
            line.writer.write(bytes(size))
            await line.writer.drain()
            await line.receive()
            found = size / (time.perf_counter() - began)
            size = min(MOST_BYTES, int(found * RATE_SECONDS))
            if size <= FIRST_BYTES:  # that took long enough
                break
        return found
    except OSError as error:
        raise PeerError(f"the connection broke ({error.strerror or error})") from None
    finally:
        line.close()
