"""Programs for CUDA as a user of torch writes them, right and wrong, run on a device without numbers.

    python tests/support/stream_programs.py

A line of JSON: by program, the uses of memory that nothing puts in order. A process of its own: torch is another afterwards.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from bench.symbolic import step
from bench.symbolic.order import Order

CUDA = torch.device("cuda", 0)


def _prefetch(*, waits: bool = True, refills: str = "") -> None:
    """A batch goes to the device on a stream of its own; `refills`: how the host waits before it fills the buffer again."""
    side, buffer = torch.cuda.Stream(), torch.zeros(64).pin_memory()
    buffer.fill_(1.0)
    with torch.cuda.stream(side):
        batch = buffer.to(CUDA, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    if waits:
        torch.cuda.current_stream().wait_event(arrived)
        batch.record_stream(torch.cuda.current_stream())
    batch + 1
    if refills:
        if refills == "after its event":
            arrived.synchronize()
        buffer.fill_(2.0)


def _freed(*, recorded: bool) -> None:
    """What a side stream still writes is let go of on the stream that it was made on."""
    side, x = torch.cuda.Stream(), torch.empty(64, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.fill_(1.0)
    if recorded:
        x.record_stream(side)


def _gathered(*, waits: bool = True, changes: bool = False) -> None:
    own, out = torch.ones(8, device=CUDA), torch.empty(16, device=CUDA)
    work = dist.all_gather_into_tensor(out, own, async_op=True)
    if changes:
        own.zero_()
    if waits:
        work.wait()
    out + 1


def _sent(*, waits: bool = True) -> None:
    """Two messages in one batch, as a ring sends them."""
    ahead, behind = torch.ones(8, device=CUDA), torch.empty(8, device=CUDA)
    works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, behind, 1), dist.P2POp(dist.isend, ahead, 1)])
    for work in works if waits else ():
        work.wait()
    behind + 1


def _downloaded(*, waits: bool) -> None:
    """A result goes to pinned memory, which the host reads."""
    kept, x = torch.zeros(8).pin_memory(), torch.ones(8, device=CUDA)
    kept.copy_(x * 2, non_blocking=True)
    if waits:
        arrived = torch.cuda.Event()
        arrived.record()
        arrived.synchronize()
    kept.sum()


def _uploaded() -> None:
    """A copy that the host waits for is there for every stream."""
    side, x = torch.cuda.Stream(), torch.ones(8).to(CUDA)
    with torch.cuda.stream(side):
        x + 1
    side.synchronize()


def _reduced() -> None:
    total = torch.ones(8, device=CUDA)
    dist.all_reduce(total)
    total + 1


PROGRAMS: dict[str, Callable[[], None]] = {
    "a batch is copied beside": lambda: _prefetch(refills="after its event"),
    "the batch is used before it is there": lambda: _prefetch(waits=False),
    "the buffer is filled too early": lambda: _prefetch(refills="at once"),
    "memory goes while it is written": lambda: _freed(recorded=False),
    "memory goes, and its allocator knows": lambda: _freed(recorded=True),
    "parts are gathered": _gathered,
    "gathered parts are not waited for": lambda: _gathered(waits=False),
    "what is gathered is changed": lambda: _gathered(changes=True),
    "a ring's message": _sent,
    "a ring's message is not waited for": lambda: _sent(waits=False),
    "a sum that the stream waits for": _reduced,
    "a result is read once it is there": lambda: _downloaded(waits=True),
    "a result is read too early": lambda: _downloaded(waits=False),
    "a copy that the host waits for": _uploaded,
}


def faults() -> Iterator[tuple[str, list[str]]]:
    mode = step.prepare()
    with step.one_of(mode, 0, 2):
        for name, program in PROGRAMS.items():
            mode.device.order = Order()
            program()
            yield name, list(mode.device.order.faults)


if __name__ == "__main__":
    print(json.dumps(dict(faults())))
