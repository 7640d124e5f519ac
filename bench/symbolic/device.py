"""What torch.cuda gives, on a machine without it: devices, streams and events whose order is recorded, memory that nobody has."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.symbolic.order import HOST, Clock, Order

DEVICES = 8  # of a node
CAPABILITY = (9, 0)


class Device:
    """The GPU of this process.

    Args:
        chosen: is called with the index that "cuda" means from then on.

    Attributes:
        order: the clocks of its streams. index: which of the node's it is. stopped: called with words where the host waits for the device.
    """

    def __init__(self, chosen: Callable[[int], None]) -> None:
        self.order, self.index, self._chosen = Order(), 0, chosen
        self.stopped: Callable[[str], None] = lambda what: None
        self._numbers = itertools.count(1)
        # Classes, as torch's are: annotations name them.
        self.stream_type: Any = type("Stream", (Stream,), {"_device": self})
        self.event_type: Any = type("Event", (Event,), {"_device": self})
        self.default = self.stream_type(name="default stream")
        self._current = [self.default]

    @property
    def current(self) -> Stream:
        return self._current[-1]

    def choose(self, index: int) -> None:
        """torch.cuda.set_device"""
        self.index = index
        self._chosen(index)

    def name(self) -> str:
        """The name of a new stream."""
        return f"stream {next(self._numbers)}"

    @contextlib.contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """torch.cuda.stream"""
        self._current.append(self.current if stream is None else stream)
        try:
            yield
        finally:
            self._current.pop()

    def synchronize(self, *unused: Any) -> None:
        self.stopped("torch.cuda.synchronize")
        for clock in list(self.order.clocks.values()):
            self.order.waits(HOST, dict(clock))


class Stream:
    """torch.cuda.Stream"""

    cuda_stream = 0
    _device: Device

    def __init__(self, *unused: Any, name: str = "", **also_unused: Any) -> None:
        self.name = name or self._device.name()
        self.device = torch.device("cuda", self._device.index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def record_event(self, event: Event | None = None) -> Event:
        event = self._device.event_type() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self._device.order.waits(self.name, event.mark)

    def wait_stream(self, stream: Stream) -> None:
        self._device.order.waits(self.name, self._device.order.now(stream.name))

    def synchronize(self) -> None:
        self._device.stopped("Stream.synchronize")
        self._device.order.waits(HOST, self._device.order.now(self.name))

    def query(self) -> bool:
        return True


class Event:
    """torch.cuda.Event"""

    _device: Device

    def __init__(self, *unused: Any, **also_unused: Any) -> None:
        self.mark: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.mark = self._device.order.now((stream or self._device.current).name)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._device.current).wait_event(self)

    def synchronize(self) -> None:
        self._device.stopped("Event.synchronize")
        self._device.order.waits(HOST, self.mark)

    def query(self) -> bool:
        """That it has happened, which only tells the host if it is asked for that: work that has ended may be told as going on."""
        return False

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def pretend(device: Device) -> None:
    """Put the device in torch.cuda's place, for the rest of this process."""
    cuda: Any = torch.cuda
    state = torch.get_rng_state  # one generator is as good as another: nothing drawn is ever looked at
    nothing = contextlib.nullcontext
    for name, value in {
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **unused: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: device.index,
        "set_device": lambda chosen: device.choose(_index(chosen)),
        "device": lambda chosen: nothing(),
        "synchronize": device.synchronize,
        "Stream": device.stream_type,
        "Event": device.event_type,
        "current_stream": lambda *unused: device.current,
        "default_stream": lambda *unused: device.default,
        "stream": device.on,
        "get_device_capability": lambda *unused: CAPABILITY,
        "get_device_name": lambda *unused: "NVIDIA H100 80GB HBM3",
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *unused: state(),
        "set_rng_state": lambda *unused: None,
        "default_generators": [torch.default_generator] * DEVICES,
        "memory_allocated": lambda *unused: 0,
        "max_memory_allocated": lambda *unused: 0,
        "memory_reserved": lambda *unused: 0,
        "max_memory_reserved": lambda *unused: 0,
        "reset_peak_memory_stats": lambda *unused: None,
        "empty_cache": lambda: None,
    }.items():
        setattr(cuda, name, value)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *unused: None
    # Modules of Megatron take these names from torch.cuda.random.
    import torch.cuda.random as generators

    named: Any = generators
    named.get_rng_state, named.set_rng_state = lambda *unused, **also: state(), lambda *unused, **also: None
    named._lazy_call, named.current_device = lambda call, **unused: None, lambda: device.index
    generator: Any = torch.Generator
    torch.Generator = type("Generator", (), {"__new__": lambda cls, device="cpu": generator()})  # type: ignore[misc, assignment]


def _index(chosen: Any) -> int:
    found = torch.device(chosen).index if not isinstance(chosen, int) else chosen
    return 0 if found is None else found
