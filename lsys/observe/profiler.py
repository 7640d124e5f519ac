"""Traces of chosen steps on chosen ranks, for Perfetto (ui.perfetto.dev) and `lsys bench trace`.

A trace is what torch.profiler records, with ranges for steps (`lsys.step 12`) and for the forward pass of layers, their
mixers and MLPs (`lsys.layer 3`, `lsys.layer 3 Lightning`, `lsys.layer 3 MLP`; variants and mixers of the user's own by their
names in `model.mixers`), and beside it communication by axis: every
operation from its issue to the end of the first wait for it, with its bytes, and a track of the times for which the rank
was blocked.
On CUDA, a snapshot of the allocator (pytorch.org/memory_viz) is written too if asked for.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lsys.config.schema import Profile
from lsys.observe.clocks import Timer
from lsys.observe.optional import say
from lsys.parallel.ledger import bytes_sent
from lsys.parallel.ledger.hooks import HOOKS, Call, Observer

CLOCK = "lsys.clock"  # a range that begins when the host's clock is read
BLOCKED = 10_000_000  # thread id of the first track


class Operation(NamedTuple):
    """An operation of communication; times are s of `time.perf_counter`."""

    axis: str
    name: str
    bytes: int
    begin: float
    end: float
    blocked: Sequence[tuple[float, float]]


class Profiler:
    """Records the steps that `train.profile` names, on the ranks that it names; elsewhere it does nothing.

    Args:
        rank: of this process. folder: gets rankN-stepM.json.gz.
        models: whose modules get ranges.
        communication: is called when a trace begins; what it gives is called when it ends, for the operations in between.
    """

    def __init__(
        self,
        settings: Profile,
        *,
        rank: int,
        folder: Path,
        device: torch.device,
        models: Iterable[nn.Module] = (),
        communication: Callable[[torch.device], Callable[[], Sequence[Operation]]] | None = None,
    ) -> None:
        self.settings, self.rank, self.folder, self.device = settings, rank, folder, device
        self.models, self.communication = list(models), communication or Communication
        self.active = settings.first > 0 and rank in settings.ranks
        self._running: contextlib.ExitStack | None = None
        self._operations: Callable[[], Sequence[Operation]] = tuple
        self._seen: Sequence[Operation] = ()
        self._profile: Any = None
        self._clock = 0.0
        self.waiting: dict[Path, bytes] = {}  # that no disk has yet

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, counted from 1."""
        if not self.active or not self.settings.first <= number <= self._last:
            yield
            return
        if self._running is None:
            self._start()
        try:
            with record_function(f"lsys.step {number}"):
                yield
        except BaseException:
            self.close()
            raise

    def is_complete(self, number: int) -> bool:
        """Whether the trace ends with this step, and waits to be written."""
        return self._running is not None and number == self._last

    @property
    def _last(self) -> int:
        return self.settings.first + self.settings.steps - 1

    def close(self) -> None:
        """To be called when the run ends: if that is within the steps of a trace, it stops without one, and says so."""
        if self._running is None:
            return
        try:
            self._stop()
        finally:
            self._forget()
        steps = f"{self.settings.first} to {self._last}"
        say(f"rank {self.rank} wrote no trace: the run ended within the traced steps, {steps}")

    @property
    def _has_memory(self) -> bool:
        return self.settings.memory and self.device.type == "cuda"

    def _forget(self) -> None:
        """Let go of what was recorded; whatever has failed, the allocator's history does not go on."""
        self._profile, self._seen = None, ()
        if self._has_memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _stop(self) -> None:
        assert self._running is not None
        running, self._running, self.active = self._running, None, False
        with running:
            self._seen = self._operations()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with contextlib.ExitStack() as stack:
            self._profile = stack.enter_context(
                profile(activities=activities, record_shapes=self.settings.shapes, with_stack=self.settings.stacks)
            )
            stack.enter_context(ranges(self.models))
            self._running = stack.pop_all()
        if self._has_memory:
            torch.cuda.memory._record_memory_history()
        self._operations = self.communication(self.device)
        for _ in range(8):  # the first ranges take longer to begin; the last counts
            with record_function(CLOCK):
                self._clock = time.perf_counter()

    def end(self) -> None:
        """End the recording, once it is complete. What is to be written waits in memory for `write`."""
        try:
            self._stop()
            name = f"rank{self.rank}-step{self.settings.first}"
            if self._has_memory:
                self.waiting[self.folder / f"{name}-memory.pickle"] = pickle.dumps(torch.cuda.memory._snapshot())
            self.waiting[self.folder / f"{name}.json.gz"] = gzip.compress(json.dumps(self._trace()).encode())
        finally:
            self._forget()

    def _trace(self) -> dict[str, Any]:
        # Kineto writes a trace once, and a disk that it finds full it only logs: so not into the run's folder.
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(plain))
            trace: dict[str, Any] = json.loads(plain.read_text())
        add_tracks(trace, self._seen, self._clock)
        return trace

    def write(self) -> Path:
        """Write what waits; the path of the trace. Raises OSError: it waits on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, data in tuple(self.waiting.items()):
            partial = path.with_name(f"{path.name}.partial")
            try:
                partial.write_bytes(data)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            del self.waiting[path]
        return path


class Communication(Observer):
    """Records the operations of this process with others from now on; `communication()` stops and gives them."""

    def __init__(self, device: torch.device) -> None:
        self.calls: list[Call] = []
        self.timer = Timer(device)
        HOOKS.add(self)

    def issued(self, call: Call, before: float, after: float) -> None:
        self.calls.append(call)

    def __call__(self) -> list[Operation]:
        HOOKS.remove(self)
        return [self._operation(call) for call in self.calls if len(call.place.ranks) > 1]

    def _operation(self, call: Call) -> Operation:
        blocked = [(self.timer.seconds(begin), self.timer.seconds(end)) for begin, end in call.blocked]
        ends = self.timer.seconds(call.begin), self.timer.seconds(call.end)
        return Operation(call.place.axis, call.operation.kind, bytes_sent(call), *ends, blocked)


@contextlib.contextmanager
def ranges(models: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, layers, their mixers and their MLPs are ranges of a trace when they run forward, recomputation included."""
    open_ranges: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles = []
    for model in models:
        for name, module in named(model):
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that get a range, and its name: layers by their number in the whole model, from 1."""
    for module in model.modules():
        number = getattr(module, "layer_number", None)
        if number is not None and hasattr(module, "self_attention"):
            layer: Any = module
            kind = type(layer.self_attention).__name__.removesuffix("Mixer")
            card = getattr(getattr(layer.self_attention, "options", None), "card", None)
            if card is not None and card.key != card.name:  # a variant, or a mixer of the user's own
                kind = card.key
            yield f"lsys.layer {number}", module
            yield f"lsys.layer {number} {kind}", layer.self_attention
            if hasattr(layer, "mlp"):
                yield f"lsys.layer {number} MLP", layer.mlp


def add_tracks(trace: dict[str, Any], operations: Sequence[Operation], clock: float) -> None:
    """Put communication into a Chrome trace; `clock`: s of the host when its last range CLOCK began.

    Operations may overlap, so they are asynchronous events; times of being blocked are slices of a track for each axis.
    """
    events: list[dict[str, Any]] = trace["traceEvents"]
    markers = [event for event in events if event.get("name") == CLOCK and event.get("cat") == "user_annotation"]
    marker = max(markers, key=lambda event: event["ts"])
    process, offset = marker["pid"], marker["ts"] - 1e6 * clock  # us
    axes = sorted({each.axis for each in operations})
    for number, axis in enumerate(axes):
        title = {"name": f"blocked: {axis}"}
        events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": BLOCKED + number, "args": title})
    for number, each in enumerate(operations):
        common = {"cat": "lsys.communication", "name": f"{each.axis} {each.name}", "pid": process, "tid": BLOCKED}
        about = {"bytes": each.bytes, "axis": each.axis}
        ends: tuple[tuple[str, float, dict[str, Any]], ...] = (("b", each.begin, about), ("e", each.end, {}))
        events += [{**common, "ph": ph, "id": number, "ts": 1e6 * at + offset, "args": args} for ph, at, args in ends]
        for begin, end in each.blocked:
            place = {"ph": "X", "tid": BLOCKED + axes.index(each.axis), "cat": "lsys.standing"}
            span = {"ts": 1e6 * begin + offset, "dur": 1e6 * (end - begin), "args": about}
            events.append({**common, **place, **span})
