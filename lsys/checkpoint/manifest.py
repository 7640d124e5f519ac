"""What a checkpoint says about itself: where the run was, and size and SHA-256 of every file."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
NAME = "manifest.json"
BLOCK = 1 << 21  # bytes that files are written, read and hashed by
WRITER = re.compile(r"__(\d+)_")  # a file's name begins with the rank that wrote it


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or is not one that this run can load. Every rank raises the same one."""

    everywhere = True  # the command line prints it once


class UnreadableError(CheckpointError):
    """A checkpoint may be whole, but not to this version of lsys, or not to this user: it is no damaged one."""


@dataclass(frozen=True)
class Cursor:
    """Where a run goes on.

    Attributes:
        step: the next step to run; as many are done.
        tokens: consumed so far, over all ranks.
        config: the resolved configuration, YAML.
        extra: what else the loop wants back; JSON values. `start` is how the run was begun (`lsys.checkpoint.choice.record`), `lr` the
            learning rate of the next step, `data` the position in the data and what data it is (`lsys.train.position`), `skipped_steps` the
            updates that were left out.
    """

    step: int
    tokens: int
    config: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """Bytes and SHA-256 (hex) of a file as they were when it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The description of one checkpoint.

    Attributes:
        cursor: where the run goes on.
        serial: counts the checkpoints of a folder; the newest one has the largest, whatever its step.
        world, degrees: ranks that wrote it, and how they were arranged.
        versions: of lsys, torch and megatron-core.
        files: every file of the checkpoint but this one, by name.
    """

    cursor: Cursor
    serial: int
    world: int
    degrees: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileRecord]
    format: int = FORMAT_VERSION

    def to_text(self) -> str:
        """JSON with a checksum of its own, since no other file vouches for this one; the same rule in every format."""
        tree = asdict(self)
        return json.dumps(tree | {"sha256": _digest(tree)}, indent=1, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> "Manifest":
        """Raises ValueError where the text is damaged, LookupError where it is of another format."""
        tree = json.loads(text)
        if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
            raise ValueError("it has no format number")
        if tree.pop("sha256", None) != _digest(tree):  # first: a flipped bit may make another format of it
            raise ValueError("its content does not match its own SHA-256")
        if tree["format"] != FORMAT_VERSION:
            raise LookupError(f"its format is {tree['format']}, this lsys reads {FORMAT_VERSION}")
        files = {name: FileRecord(**record) for name, record in tree.pop("files").items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("it names files outside the checkpoint")
        return cls(cursor=Cursor(**tree.pop("cursor")), files=files, **tree)

    def write(self, folder: Path) -> None:
        """Write into `folder` so that it survives a power failure."""
        with open(folder / NAME, "w", encoding="utf-8") as file:
            file.write(self.to_text())
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises CheckpointError where `folder` is no checkpoint or a damaged one, UnreadableError where it is of another format."""
        return cls.read_bytes(folder, _content(folder / NAME, f"{folder} is no checkpoint: it has no {NAME}"))

    @classmethod
    def read_bytes(cls, folder: Path, content: bytes) -> "Manifest":
        """As `read`, of what was read from the folder."""
        try:
            return cls.from_text(content.decode("utf-8"))
        except LookupError as error:
            raise UnreadableError(
                f"{folder} cannot be read: {error.args[0]}; load it with the lsys that wrote it"
            ) from None
        except (ValueError, TypeError) as error:  # bad UTF-8 and JSON are ValueErrors
            raise CheckpointError(f"{folder / NAME} is damaged: {error}") from None

    def incomplete(self, folder: Path) -> str | None:
        """The first file that is missing or has another size, in words; None if there is none. Raises UnreadableError."""
        for name, record in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return f"{name} is missing"
            except OSError as error:
                raise UnreadableError(f"{folder / name} cannot be read: {error.strerror}") from None
            if size != record.size:
                return f"{name} has {size} bytes, {record.size} were written"
        return None

    def share(self, rank: int, world: int) -> list[str]:
        """The files that one of `world` ranks verifies: what it wrote, if there are as many, since it reads that again; each is one rank's."""
        names = sorted(self.files)
        writers = [int(found[1]) if (found := WRITER.match(name)) else index for index, name in enumerate(names)]
        return [name for name, writer in zip(names, writers, strict=True) if writer % world == rank]

    def verify(self, folder: Path, names: Iterable[str]) -> None:
        """Compare files with their records. Raises CheckpointError that names every one that differs; UnreadableError."""
        wrong = []
        for name in names:
            record = self.files[name]
            try:
                size, digest = _hashed(folder / name)
            except (FileNotFoundError, IsADirectoryError):
                wrong.append(f"{name} is missing")
                continue
            except OSError as error:
                if error.errno != errno.EIO:
                    raise UnreadableError(f"{folder / name} cannot be read: {error.strerror}") from None
                wrong.append(f"{name} cannot be read: {error.strerror}")
                continue
            if size != record.size:
                wrong.append(f"{name} has {size} bytes, {record.size} were written")
            elif digest != record.sha256:
                wrong.append(
                    f"{name} was changed after it was written (SHA-256 {digest[:12]}..., not {record.sha256[:12]}...)"
                )
        if wrong:
            raise CheckpointError("; ".join(wrong))


def digest(folder: Path) -> str:
    """SHA-256 (hex) of a checkpoint's manifest, which names the hashes of all else. Raises CheckpointError where there is none."""
    return hashlib.sha256(_content(folder / NAME, f"{folder} is no checkpoint: it has no {NAME}")).hexdigest()


def _content(file: Path, missing: str) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(missing) from None
    except OSError as error:
        kind = CheckpointError if error.errno == errno.EIO else UnreadableError  # EIO: the medium is at fault
        raise kind(f"{file} cannot be read: {error.strerror}") from None


def _hashed(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file."""
    size, digest, block = 0, hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(block):
            digest.update(block[:got])
            size += got
    return size, digest.hexdigest()


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
