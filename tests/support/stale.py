"""Filesystems that show one rank something else than is there: listings and files of before, for a while or for ever."""

import collections
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

KINDS = ("hidden", "late", "manifest", "older", "bytes")


def view(kind: str, name: str, *, file: str = "", older: Path | None = None) -> AbstractContextManager[None]:
    """What a rank sees of the checkpoint `name`, while the block runs, in this process.

    Args:
        kind: `hidden`: nothing, for ever; `late`: nothing at first; `manifest`: another manifest; `older`: that of the folder `older`;
            `bytes`: other content of `file`, of the same size.
    """
    return {
        "hidden": lambda: hidden(name),
        "late": lambda: hidden(name, late=5),
        "manifest": lambda: another_manifest(name, None),
        "older": lambda: another_manifest(name, older),
        "bytes": lambda: other_bytes(name, file),
    }[kind]()


@contextmanager
def hidden(name: str, late: int = 0) -> Iterator[None]:
    """A filesystem that does not show a checkpoint, for so many looks at it, or for ever: neither in listings nor by its name."""
    import os

    looks = collections.Counter[str]()

    def is_hidden(path: Any) -> bool:
        if name not in str(path):
            return False
        looks["all"] += 1
        return not late or looks["all"] <= late

    read, listing = Path.read_bytes, os.listdir

    def read_bytes(path: Path) -> bytes:
        if is_hidden(path):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read(path)

    def listdir(path: Any = ".") -> list[str]:
        return [each for each in listing(path) if not is_hidden(f"{path}/{each}")]

    with mock.patch.object(Path, "read_bytes", read_bytes), mock.patch.object(os, "listdir", listdir):
        yield


@contextmanager
def another_manifest(name: str, older: Path | None) -> Iterator[None]:
    """A filesystem that shows the manifest that was there before: with a byte more, or that of another folder."""
    read = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if name not in str(path):
            return read(path)
        return read(older / path.name) if older else read(path) + b" "

    with mock.patch.object(Path, "read_bytes", read_bytes):
        yield


@contextmanager
def other_bytes(name: str, file: str) -> Iterator[None]:
    """A filesystem that shows another file's bytes, of the same size."""
    from lsys.checkpoint import manifest

    hashed = manifest._hashed

    def other(path: Path) -> tuple[int, str]:
        size, digest = hashed(path)
        return size, digest[::-1] if str(path).endswith(f"{name}/{file}") else digest

    with mock.patch.object(manifest, "_hashed", other):
        yield
