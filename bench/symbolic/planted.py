"""Faults put into a symbolic step, to see that it tells them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _item(mixed: Any) -> None:
    """A number of the device is read on the host."""
    mixed.sum().item()


def _cpu(mixed: Any) -> None:
    """An activation goes to the host."""
    mixed.cpu()


def _pageable(mixed: Any) -> None:
    """Indices are copied from memory that is not pinned, though it says non_blocking."""
    torch.zeros(8, dtype=torch.int64).to(mixed.device, non_blocking=True)


def _on_host(mixed: Any) -> None:
    """A kernel of Triton is given a tensor of the host."""
    from lsys.kernels.linear_attention.gpu.scan import scan_kernel

    scan_kernel.run(mixed, torch.zeros(8), grid=(1,), warmup=False)


IN_MIXERS: dict[str, Callable[[Any], None]] = {
    "a number read": _item,
    "a copy to the host": _cpu,
    "a pageable copy": _pageable,
    "a tensor of the host in a kernel": _on_host,
}
FAULTS = ("", *IN_MIXERS, "a message that is not waited for")


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """Inside, the fault is there."""
    if name not in FAULTS:
        raise ValueError(f"there is no fault {name!r}; there are {', '.join(filter(None, FAULTS))}")
    if name in IN_MIXERS:
        from lsys.model.mixers.mixer import Mixer

        mixed = Mixer._mix_documents
        with _replaced(Mixer, "_mix_documents", _followed(mixed, IN_MIXERS[name])):
            yield
    elif name:
        from lsys.parallel.comm import Pending

        with _replaced(Pending, "wait", _unwaited):
            yield
    else:
        yield


def _followed(function: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        then(out)
        return out

    return both


def _unwaited(pending: Any) -> Any:
    """Pending.wait without the wait for its works."""
    if pending._finish is not None:
        pending._value, pending._finish, pending._works = pending._finish(), None, pending._works
    return pending._value


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)
