"""What may run at the same time on the streams of a device: clocks of what each has waited for, and accesses that nothing puts in order.

The rules are those of CUDA and of torch's caching allocators. Work on one stream runs in order, after what the host had waited for when it was
issued; a stream waits for an event's place in another; the memory of a tensor that is let go of is given out again at once on the stream that
it was made on, or waits for the streams that it was recorded on.

Source of the method: vector clocks, as in race detectors (Flanagan & Freund, FastTrack, 2009).
"""

from __future__ import annotations

from dataclasses import dataclass, field

HOST = "host"
Clock = dict[str, int]


@dataclass(frozen=True)
class Access:
    """One use of memory by an actor: the host or a stream, at its `tick`."""

    actor: str
    tick: int
    what: str


@dataclass
class Cell:
    """Bytes of a piece of memory that have been used alike: the last write of them, and the last read by each actor since."""

    begin: int
    end: int
    write: Access | None = None
    reads: dict[str, Access] = field(default_factory=dict)


@dataclass
class Memory:
    """What is known of one piece of memory.

    Attributes:
        owner: the stream that it was made on; HOST for pinned memory. recorded: other streams that its allocator knows of.
        cells: by their places; bytes in none of them were never used.
    """

    owner: str
    recorded: set[str] = field(default_factory=set)
    cells: list[Cell] = field(default_factory=list)

    def within(self, begin: int, end: int) -> list[Cell]:
        """Cells that are just these bytes; those at the borders are divided, and gaps filled."""
        kept: list[Cell] = []
        found: list[Cell] = []
        place = begin
        for cell in self.cells:
            if cell.end <= begin or cell.begin >= end:
                kept.append(cell)
                continue
            if cell.begin > place:
                found.append(Cell(place, cell.begin))
            for low, high in ((cell.begin, begin), (max(cell.begin, begin), min(cell.end, end)), (end, cell.end)):
                if low < high:
                    part = Cell(low, high, cell.write, dict(cell.reads))
                    (found if begin <= low < end else kept).append(part)
            place = min(cell.end, end)
        if place < end:
            found.append(Cell(place, end))
        self.cells = sorted((*kept, *found), key=lambda cell: cell.begin)
        return found

    def written(self, begin: int, end: int, access: Access) -> None:
        """These bytes are one cell from now on."""
        rest = [cell for cell in self.cells if cell.end <= begin or cell.begin >= end]
        self.cells = sorted((*rest, Cell(begin, end, access)), key=lambda cell: cell.begin)


class Order:
    """The clocks of a device's streams and of the host.

    Attributes:
        faults: accesses that nothing puts in order, in words, each once.
    """

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {HOST: {HOST: 1}}
        self.faults: dict[str, None] = {}

    def clock(self, actor: str) -> Clock:
        return self.clocks.setdefault(actor, {actor: 0})

    def waits(self, actor: str, seen: Clock) -> None:
        """`actor` goes on only after what `seen` has seen."""
        own = self.clock(actor)
        for name, tick in seen.items():
            own[name] = max(own.get(name, 0), tick)

    def now(self, actor: str) -> Clock:
        """A mark: what `actor` has done and waited for so far."""
        return dict(self.clock(actor))

    def issue(self, actor: str) -> int:
        """The tick of an operation of `actor`, issued by the host now."""
        self.waits(actor, self.clocks[HOST])
        own = self.clock(actor)
        own[actor] = own.get(actor, 0) + 1
        return own[actor]

    def access(self, memory: Memory, place: tuple[int, int], access: Access, *, writes: bool) -> None:
        """Bytes from place[0] to place[1] are read or written."""
        seen = self.clock(access.actor)
        for cell in memory.within(*place):
            if cell.write is not None:
                self._require(cell.write, seen, access, "was written")
            for read in cell.reads.values() if writes else ():
                self._require(read, seen, access, "was read")
            if not writes:
                cell.reads[access.actor] = access
        if writes:
            memory.written(*place, access)

    def free(self, memory: Memory, what: str) -> None:
        """The memory goes back to its allocator: whoever gets it next on the owner's stream may write at once."""
        self.waits(memory.owner, self.clocks[HOST])  # who gets it is issued later
        seen, last = self.clock(memory.owner), Access(memory.owner, 0, what)
        for cell in memory.cells:
            for access in (*([cell.write] if cell.write else []), *cell.reads.values()):
                if access.actor not in memory.recorded:
                    self._require(access, seen, last, "was used")

    def _require(self, before: Access, seen: Clock, after: Access, done: str) -> None:
        if seen.get(before.actor, 0) < before.tick:
            told = f"{after.what} on {after.actor} does not wait for {before.what} on {before.actor}, by which the memory {done}"
            self.faults.setdefault(told)
