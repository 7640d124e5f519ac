"""Records the steps of this rank: when regions and waits for communication began and ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from lsys.observe.clocks import RunQueue, Timer, clock_offset
from lsys.observe.waterfall import CORE, REPORT, Moved, Waterfall, exposed, part_names
from lsys.observe.waterfall_peers import Peers
from lsys.observe.waterfall_split import REGIONS, Blocked, Boundary, Split
from lsys.parallel.ledger import OTHER, WORLD
from lsys.parallel.ledger.hooks import HOOKS, Call, Observer
from lsys.runtime.groups import AXES, Groups


def is_sampled(number: int, every: int) -> bool:
    """Whether step `number`, from 1, is the one that is recorded of its block of `every` steps: 1 .. every, and so on.

    Its place in the block is a hash of the block's number, the same on all ranks and in every run. At a fixed place, what
    is done at intervals that `every` divides, as checkpoints and reports are, would be recorded always or never.
    """
    block, place = divmod(number - 1, every)
    mixed = (block + 1) * 0x9E3779B97F4A7C15 % 2**64  # as in splitmix64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    return (mixed >> 32) % every == place


class Recorder(Observer):
    """Splits the time of steps into the parts of `lsys.observe.waterfall`. All ranks record the same steps.

        with recorder.recording(first=1):
            while ...:
                with recorder.region("data"): ...
                with recorder.region("compute"): ...
                recorder.end_step(number)
                with recorder.region("report"):
                    waterfall = recorder.take()     # on all ranks, after the same step

    Args:
        every: one of every so many steps is recorded, see `is_sampled`; 0: none.
    """

    def __init__(self, groups: Groups, every: int = 1) -> None:
        self.groups, self.every = groups, every
        collection, self.is_on = groups.collection, False
        self._current: list[Boundary | Blocked] = []  # the step that is being recorded
        named = [getattr(collection, name, None) for name in AXES] + [dist.group.WORLD] if every else []
        stages = dist.get_process_group_ranks(collection.pp)
        self.peers = Peers([group for group in named if group is not None], stages, groups.device)
        present = {axis for axis, _ in self.peers.channels}
        self.axes = [axis for axis in dict.fromkeys((*AXES.values(), WORLD)) if axis in present] + [OTHER] * bool(
            present
        )
        self.parts = part_names(
            self.axes, ranks=dist.get_world_size(), stages=len(stages), cores=groups.device.type == "cpu"
        )
        self._said: set[str] = set()

    # ---- what the loop calls

    @contextlib.contextmanager
    def recording(self, first: int) -> Iterator[None]:
        """Around the steps, of which `first` is the first. On the thread that runs them."""
        self._thread, queue = threading.get_ident(), None
        self._timer = Timer(self.groups.device)
        self._split = Split(self._timer, self.peers, self.axes)
        self._closed: list[list[Boundary | Blocked]] = []  # steps that are not split yet
        if self.groups.device.type == "cpu" and self.every:
            with contextlib.suppress(OSError):  # `_notes` tells
                queue = self.clock = RunQueue()
        try:
            self._begin_step(first)
            yield
        finally:
            self._switch(False)
            self.clock = None
            if queue is not None:
                queue.close()

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        """What happens inside counts to this part: "compute", "data", "checkpoint", "report", or with "paused" to none.

        Regions do not nest. Communication is told from computation inside "compute", and between regions.
        """
        assert name in REGIONS, name
        self._boundary(name)
        try:
            yield
        finally:
            self._boundary(None)

    def end_step(self, number: int) -> None:
        """Step `number` ends here, and the next one begins; summing up earlier ones is its report."""
        if self.is_on:
            self._boundary(None)
            self._closed.append(self._current)
        self._begin_step(number + 1)
        if len(self._closed) > 1:
            with self.region(REPORT):
                self._sum_up(keep=1)  # on a GPU, work of the newest may still be under way: nothing waits for it

    def take(self) -> Waterfall | None:
        """The steps that ended since the last call, on every rank; None if none was recorded.

        Collective over the default group and those of Megatron; to be called on all ranks after the same step.
        """
        self._sum_up()
        if not self._split.steps:
            return None
        nodes = self.groups.nodes
        offset = clock_offset(nodes, self.groups.device) if len(set(nodes)) > 1 else 0.0
        differing = self.peers.exchange(offset)
        self._split.settle()
        waterfall = self._gather(differing)
        # The step that has begun keeps its marks as seconds: those of CUDA do not outlive the reference.
        self._current = [
            each._replace(mark=self._timer.seconds(each.mark)) for each in self._current if isinstance(each, Boundary)
        ]
        self._timer.anchor()
        self._split.restart()
        return waterfall

    # ---- what the ledger's hooks call

    def issued(self, call: Call, before: float, after: float) -> None:
        if self._is_blocking(call):
            self._current.append(Blocked(*call.blocked[0], before, after, [call], True))

    def waited(self, call: Call, before: float, after: float) -> None:
        if not self._is_blocking(call):
            return
        begin, end = call.blocked[-1]
        last = self._current[-1]
        if isinstance(last, Blocked) and last.end is end:  # of the same batch
            last.calls.append(call)
        else:
            self._current.append(Blocked(begin, end, before, after, [call], False))

    def _is_blocking(self, call: Call) -> bool:
        """On a CPU, only what the thread of the loop waits for; on a GPU all, for it is the stream that waits."""
        on_host = isinstance(call.begin, float)
        return self.is_on and len(call.place.ranks) > 1 and (not on_host or threading.get_ident() == self._thread)

    # ---- recording

    def _begin_step(self, number: int) -> None:
        """Where the step before was recorded, it ends with the mark with which this one begins: no time is between them."""
        on, was_on = self.every > 0 and is_sampled(number, self.every), self.is_on
        if on and not was_on and self._timer.is_cuda:
            # The reference may be many steps old, and what is measured from it coarse. What was marked since needs it.
            self._sum_up()
            self._timer.anchor()
        self._switch(on)
        self._current = self._current[-1:] if on and was_on else []
        if not was_on:
            self._boundary(None)

    def _sum_up(self, keep: int = 0) -> None:
        """Split the steps that have ended, but for so many of the newest."""
        while len(self._closed) > keep:
            self._split.add(self._closed.pop(0))

    def _switch(self, on: bool) -> None:
        if on != self.is_on:
            (HOOKS.add if on else HOOKS.remove)(self)
            self.is_on = on

    def _boundary(self, region: str | None) -> None:
        if self.is_on:
            self._current.append(Boundary(self._timer.mark(), self.clock() if self.clock else 0.0, region))

    # ---- the ranks' sums

    def _gather(self, differing: list[str]) -> Waterfall:
        """All ranks' parts, on every rank."""
        split, steps = self._split, self._split.steps
        own = [split.seconds[part] / steps for part in self.parts]
        own += [split.moved[axis, what] / steps for axis in self.axes for what in ("bytes", "total", "calls")]
        own += [float(axis in differing) for axis in self.axes] + [float(self.clock is None)]
        mine = torch.tensor([own], dtype=torch.float64, device=self.groups.device)
        whole = mine.new_empty(dist.get_world_size(), len(own))
        dist.all_gather_into_tensor(whole, mine)  # [ranks, figures]
        rows = whole.tolist()
        means = dict(zip(self.parts, whole.mean(0).tolist(), strict=False))
        count = len(self.parts)
        moved = {}
        for place, axis in enumerate(self.axes):
            sent, total, calls = whole.mean(0)[count + 3 * place :][:3].tolist()
            if calls:
                moved[axis] = Moved(sent, total, means[exposed(axis)])
        flags = whole[:, count + 3 * len(self.axes) :].amax(0).tolist()
        return Waterfall(
            steps=steps,
            seconds=sum(means.values()),
            parts=means,
            per_rank=tuple(dict(zip(self.parts, row, strict=False)) for row in rows),
            moved=moved,
            notes=self._notes([axis for axis, flag in zip(self.axes, flags, strict=False) if flag], bool(flags[-1])),
        )

    def _notes(self, differing: list[str], is_coreless: bool) -> tuple[str, ...]:
        """What is to be said now; everything once in a run."""
        notes = {
            f"{axis}: its ranks issued different operations, so that waiting for each other counts as exposed": None
            for axis in differing
        }
        if is_coreless and CORE in self.parts:
            notes["core: this system does not tell how long a thread waits for a core; that counts where it waited"] = (
                None
            )
        new = tuple(note for note in notes if note not in self._said)
        self._said.update(new)
        return new
