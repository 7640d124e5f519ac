"""The hooks: while something records, the methods of ProcessGroup by which Python issues operations, and Work.wait.

`torch.distributed`'s functions call them, and so does all that is built on these functions, Megatron included. What C++
issues by itself is not seen: the reducer of torch's own DistributedDataParallel, and functional collectives.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lsys.parallel.ledger.labels import Place, Places
from lsys.parallel.traffic import ANY, Operation

Mark = float | torch.cuda.Event  # a moment: seconds of the clock, or a place in a CUDA stream
Tensors = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]


class Call:
    """One operation as it was issued, and what is known of its time so far.

    Attributes:
        share: which part of its marks is its own: operations that were issued as one batch share them equally.
        begin, end: marks of its issue and of its completion, as far as the issuing side saw it.
        blocked: pairs of marks between which the issuing side was blocked.
    """

    __slots__ = ("operation", "place", "backend", "share", "begin", "end", "blocked", "__weakref__")

    def __init__(self, operation: Operation, place: Place, backend: str, begin: Mark, issued: Mark) -> None:
        self.operation, self.place, self.backend, self.share = operation, place, backend, 1.0
        self.begin, self.end, self.blocked = begin, issued, [(begin, issued)]


class Observer:
    """What the hooks report to. `clock`: is read before and after each issue and wait, on the thread that does it."""

    clock: Callable[[], float] | None = None

    def issued(self, call: Call, before: float, after: float) -> None:
        """An operation was issued; what `clock` gave before and after, 0 without one."""

    def waited(self, call: Call, before: float, after: float) -> None:
        """The first wait for it returned."""


# ---- arguments of the methods -> Operation


def _bytes(tensors: Tensors) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_bytes, tensors))


def _of(kind: str) -> Callable[..., Operation]:
    """The parser of an operation whose first argument is the tensors that it works on."""
    return lambda group, tensors, *_: Operation(kind, _bytes(tensors))


def _of_second(kind: str) -> Callable[..., Operation]:
    """(outputs, inputs): the inputs count."""
    return lambda group, outputs, inputs, *_: Operation(kind, _bytes(inputs))


def _rooted(kind: str) -> Callable[..., Operation]:
    """(tensors, options or root)."""

    def parse(group: dist.ProcessGroup, tensors: Tensors, root: Any, *_: Any) -> Operation:
        return Operation(kind, _bytes(tensors), getattr(root, "rootRank", root))

    return parse


def _rooted_pair(kind: str, part: int) -> Callable[..., Operation]:
    """(outputs, inputs, options or root): `part` says which of the two is one rank's part."""

    def parse(group: dist.ProcessGroup, outputs: Any, inputs: Any, root: Any, *_: Any) -> Operation:
        return Operation(kind, _bytes((outputs, inputs)[part]), getattr(root, "rootRank", root))

    return parse


def _send(group: dist.ProcessGroup, tensors: Tensors, peer: int, *_: Any) -> Operation:
    return Operation("send", _bytes(tensors), peer)


def _recv(group: dist.ProcessGroup, tensors: Tensors, peer: int, *_: Any) -> Operation:
    return Operation("recv", _bytes(tensors), peer)


def _recv_any(group: dist.ProcessGroup, tensors: Tensors, *_: Any) -> Operation:
    return Operation("recv", _bytes(tensors), ANY)


def _all_to_all_single(
    group: dist.ProcessGroup, output: Tensor, input: Tensor, receive: Sequence[int], send: Sequence[int], *_: Any
) -> Operation:
    return Operation("all_to_all", send=_parts(group, input, send), receive=_parts(group, output, receive))


def _parts(group: dist.ProcessGroup, x: Tensor, rows: Sequence[int]) -> tuple[int, ...]:
    if not rows:
        return (x.nbytes // group.size(),) * group.size()
    row = x.nbytes // x.shape[0] if x.shape[0] else 0
    return tuple(count * row for count in rows)


def _all_to_all(group: dist.ProcessGroup, outputs: Sequence[Tensor], inputs: Sequence[Tensor], *_: Any) -> Operation:
    return Operation("all_to_all", send=tuple(map(_bytes, inputs)), receive=tuple(map(_bytes, outputs)))


def _barrier(group: dist.ProcessGroup, *_: Any) -> Operation:
    return Operation("barrier")


# By method of ProcessGroup, in all of torch's spellings; those that this torch lacks are left out.
PARSERS: dict[str, Callable[..., Operation]] = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), _of("all_reduce")),
    **dict.fromkeys(("allgather", "_allgather_base", "all_gather_single"), _of_second("all_gather")),
    **dict.fromkeys(
        ("allgather_coalesced", "allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
        _of_second("all_gather"),
    ),
    **dict.fromkeys(("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"), _of_second("reduce_scatter")),
    **dict.fromkeys(
        ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"), _of_second("reduce_scatter")
    ),
    **dict.fromkeys(("alltoall_base", "all_to_all_single"), _all_to_all_single),
    "alltoall": _all_to_all,
    "broadcast": _rooted("broadcast"),
    "reduce": _rooted("reduce"),
    "gather": _rooted_pair("gather", 1),
    "scatter": _rooted_pair("scatter", 0),
    "send": _send,
    "recv": _recv,
    "recv_anysource": _recv_any,
    "barrier": _barrier,
    "monitored_barrier": _barrier,
}


# ---- the hooks themselves


def _is_cuda(arguments: tuple[Any, ...]) -> bool:
    """Whether tensors among the arguments, the first two of which may be lists of them, are on a GPU."""
    for argument in arguments[:2]:
        while isinstance(argument, (list, tuple)) and argument:
            argument = argument[0]
        if isinstance(argument, Tensor):
            return argument.is_cuda
    return False


def _mark(cuda: bool) -> Mark:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()  # on the current stream, which is the one that waits; nothing is synchronised
    return event


class Hooks:
    """The observers, and torch's methods while there are any."""

    def __init__(self) -> None:
        self._observers: tuple[Observer, ...] = ()
        self._clocks: tuple[Callable[[], float], ...] = ()
        self._originals: list[tuple[type, str, Any]] = []
        self._places = Places()
        self._waiting: weakref.WeakKeyDictionary[dist.Work, list[tuple[Call, tuple[Observer, ...]]]]
        self._batches: dict[dist.ProcessGroup, list[tuple[Call, tuple[Observer, ...]]]] = {}
        self._lock = threading.Lock()

    def add(self, observer: Observer) -> None:
        with self._lock:
            if not self._observers:
                self._install()
            self._observers += (observer,)
            self._clocks = tuple({each.clock for each in self._observers if each.clock is not None})

    def remove(self, observer: Observer) -> None:
        with self._lock:
            self._observers = tuple(each for each in self._observers if each is not observer)
            self._clocks = tuple({each.clock for each in self._observers if each.clock is not None})
            if not self._observers:
                self._uninstall()

    def _install(self) -> None:
        self._waiting = weakref.WeakKeyDictionary()
        self._places.__enter__()
        for name, parse in PARSERS.items():
            if hasattr(dist.ProcessGroup, name):
                self._replace(dist.ProcessGroup, name, self._issue(getattr(dist.ProcessGroup, name), parse))
        self._replace(dist.ProcessGroup, "_start_coalescing", self._start(dist.ProcessGroup._start_coalescing))
        self._replace(dist.ProcessGroup, "_end_coalescing", self._end(dist.ProcessGroup._end_coalescing))
        self._replace(dist.Work, "wait", self._wait(dist.Work.wait))

    def _uninstall(self) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)
        self._originals.clear()
        self._places.__exit__()
        self._waiting.clear()
        self._batches.clear()

    def _read(self) -> dict[Callable[[], float] | None, float]:
        return {clock: clock() for clock in self._clocks}

    def _replace(self, owner: type, name: str, hook: Callable[..., Any]) -> None:
        self._originals.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, hook)

    def _issue(self, original: Callable[..., Any], parse: Callable[..., Operation]) -> Callable[..., Any]:
        def issue(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())  # by name, too, they come in the order of the parameters
            cuda, before = _is_cuda(values), self._read()
            begin = _mark(cuda)
            work = original(group, *args, **kwargs)
            issued = _mark(cuda)
            operation = parse(group, *values)
            peer = operation.peer if operation.kind in ("send", "recv") else None
            call = Call(operation, self._places(group, peer), "nccl" if cuda else "gloo", begin, issued)
            observers = self._observers
            if group in self._batches:
                self._batches[group].append((call, observers))
            elif work is not None:
                self._waiting[work] = [(call, observers)]
            after = self._read()
            for observer in observers:
                observer.issued(call, before.get(observer.clock, 0.0), after.get(observer.clock, 0.0))
            return work

        return issue

    def _start(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def start(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            self._batches[group] = []
            return original(group, *args, **kwargs)

        return start

    def _end(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The work of a batch is that of all its operations."""

        def end(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            work = original(group, *args, **kwargs)
            batch = self._batches.pop(group, [])
            for call, _ in batch:
                call.share = 1 / len(batch)
            if work is not None and batch:
                self._waiting[work] = batch
            return work

        return end

    def _wait(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            entries = self._waiting.pop(work, None)
            if entries is None:  # waited for before, or issued before the recording
                return original(work, *args, **kwargs)
            before, cuda = self._read(), not isinstance(entries[0][0].begin, float)
            begin = _mark(cuda)
            try:
                return original(work, *args, **kwargs)
            finally:
                end = _mark(cuda)
                after = self._read()
                for call, observers in entries:
                    call.end = end
                    call.blocked.append((begin, end))
                    for observer in observers:
                        observer.waited(call, before.get(observer.clock, 0.0), after.get(observer.clock, 0.0))

        return wait


HOOKS = Hooks()  # process-wide, as the process groups are
