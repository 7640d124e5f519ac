"""The files of a checkpoint, in torch's format: large writes that are hashed as they pass, and reads of what is asked for.

Each tensor is a `torch.save` of its own inside a file. torch writes one with 39 calls, most of a few bytes, and reads all of it for any part.
"""

import collections
import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, _StorageInfo
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lsys.checkpoint.manifest import BLOCK, CheckpointError, FileRecord

AHEAD = 3  # blocks that are written and wait for being hashed


class Writer(FileSystemWriter):
    """Writes what a plan of torch's gives a rank into one file.

    Args:
        files: which keeps the records of what is written.
    """

    def __init__(self, folder: Path, files: "Files") -> None:
        super().__init__(folder, sync_files=False)  # `files` does
        self.fs = self.files = files

    def storage_meta(self) -> None:
        """None of the folder's present name and a random id: nothing reads them, and equal states should give equal files."""

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        name, results = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}", []
        with without_checksums(), self.files.create_stream(Path(self.path) / name, "wb") as stream:
            for item in plan.items:
                first, data = stream.tell(), planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    stream.write(data.getbuffer())
                else:
                    stream.source = _alone(data.detach().cpu())
                    torch.save(stream.source, stream)
                length = stream.tell() - first
                results.append(WriteResult(item.index, length, _StorageInfo(name, first, length)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Inside, torch computes no CRC32 of what it saves, a pass over memory that nothing reads: the manifest has the SHA-256 of every file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _alone(tensor: Tensor) -> Tensor:
    """The same numbers, in the same memory, as all of a storage; torch would save the rest of it, too."""
    tensor = tensor.contiguous()
    storage, first = tensor.untyped_storage(), tensor.storage_offset() * tensor.itemsize
    if len(storage) == tensor.nbytes:
        return tensor
    return torch.empty(0, dtype=tensor.dtype).set_(storage[first : first + tensor.nbytes], 0, tensor.shape)  # type: ignore[call-overload]


class Files(FileSystem):
    """Writes files, and keeps their sizes and hashes as they pass."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:  # a HashedStream
        with open(path, mode, buffering=0) as file, ThreadPoolExecutor(1) as beside:
            stream = HashedStream(file, beside)
            try:
                yield stream
                stream.end()
                os.fsync(file.fileno())
            except RuntimeError as error:  # torch's zip writer says "unexpected pos" for a full disk
                raise stream.error or error from error
        self.records[Path(path).name] = FileRecord(stream.size, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class HashedStream:
    """A file written in blocks of BLOCK bytes, each hashed by a thread meanwhile; remembers the first error of the system.

    Args:
        file: open for writing, without a buffer.
        beside: the thread.

    Attributes:
        source: what the memory of `write` belongs to; large pieces of it are hashed after `write` has returned.
    """

    def __init__(self, file: Any, beside: ThreadPoolExecutor) -> None:
        self.file, self.beside, self.size, self.digest = file, beside, 0, hashlib.sha256()
        self.source: object = None
        self.error: OSError | None = None
        self._buffers = collections.deque(memoryview(bytearray(BLOCK)) for _ in range(AHEAD + 1))
        self._held = 0  # bytes in the first buffer
        self._hashing: collections.deque[tuple[Any, object]] = collections.deque()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        taken = rest.nbytes
        self.size += taken
        while rest:
            if (
                not self._held and len(rest) >= BLOCK and self.source is not None
            ):  # else its memory may be another's before it is hashed
                self._put(rest[:BLOCK])
                rest = rest[BLOCK:]
                continue
            part = rest[: BLOCK - self._held]
            self._buffers[0][self._held : self._held + len(part)] = part
            self._held, rest = self._held + len(part), rest[len(part) :]
            if self._held == BLOCK:
                self._put_held()
        return taken

    def end(self) -> None:
        """Write what is held, and hash what is left."""
        self._put_held()
        self._hash_to(0)

    def _put_held(self) -> None:
        self._put(self._buffers[0][: self._held])
        self._held = 0
        self._buffers.rotate()  # it is not the first again before it has been hashed

    def _put(self, block: memoryview) -> None:
        self._hashing.append((self.beside.submit(self.digest.update, block), self.source))
        self._hash_to(AHEAD)
        try:
            while block:
                block = block[self.file.write(block) :]
        except OSError as error:
            self.error = self.error or error
            raise

    def _hash_to(self, left: int) -> None:
        while len(self._hashing) > left:
            self._hashing.popleft()[0].result()

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Left to `Files`; torch flushes after each tensor."""

    def close(self) -> None:
        """Left to `Files`."""


class Reader(FileSystemReader):
    """Reads what a plan of torch's asks for, and no more of a large tensor than that."""

    def __init__(self, folder: str | Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        requests: dict[str, list[tuple[_StorageInfo, ReadItem]]] = {}
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            requests.setdefault(info.relative_path, []).append((info, item))
        for name, asked in requests.items():
            with open(Path(self.path) / name, "rb") as file:
                for info, item in sorted(asked, key=lambda pair: pair[0].offset):
                    if item.type == LoadItemType.BYTE_IO:
                        planner.load_bytes(item, io.BytesIO(self._slice_file(file, info).read(-1)))
                    else:
                        target = planner.resolve_tensor(item)
                        self._fill(target.detach(), file, info, item)
                        planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, target: Tensor, file: Any, info: _StorageInfo, item: ReadItem) -> None:
        saved = torch.load(self._slice_file(file, info), map_location="meta", weights_only=True)
        if not isinstance(saved, Tensor) or not saved.is_contiguous():
            raise CheckpointError(f"{item.storage_index.fqn} in {info.relative_path} is no contiguous tensor")
        box = zip(item.storage_offsets, item.lengths, saved.shape, strict=True)
        if target.shape != item.lengths or any(first < 0 or first + n > size for first, n, size in box):
            raise CheckpointError(f"{item.storage_index.fqn} in {info.relative_path} has shape {list(saved.shape)}")
        place = saved.untyped_storage()._checkpoint_offset + int(saved.storage_offset()) * saved.itemsize  # type: ignore[attr-defined, operator]
        if place + saved.nbytes > info.length:
            raise CheckpointError(f"{item.storage_index.fqn} in {info.relative_path} is cut short")
        place += info.offset
        first = sum(a * b for a, b in zip(item.storage_offsets, saved.stride(), strict=True))
        copy_box(target, file.fileno(), place + first * saved.itemsize, saved.dtype, saved.stride())


def copy_box(target: Tensor, file: int, place: int, dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    """Fill `target` with the numbers of a file, the first of them at byte `place`; holds at most BLOCK bytes.

    Args:
        dtype: of the file's numbers, converted to the target's.
        strides: numbers of the file from one to the next along each dimension of the target.
    """
    if not target.numel():
        return
    span = 1 + sum((n - 1) * stride for n, stride in zip(target.shape, strides, strict=True))
    dense = span == target.numel() and target.is_contiguous()
    if dense and target.dtype == dtype and target.device.type == "cpu":
        _read(file, place, target)
    elif span * dtype.itemsize <= BLOCK:
        near = torch.empty(span, dtype=dtype)
        _read(file, place, near)
        target.copy_(near.as_strided(target.shape, strides))
    elif len(target) == 1:
        copy_box(target[0], file, place, dtype, strides[1:])
    else:
        half = len(target) // 2
        copy_box(target[:half], file, place, dtype, strides)
        copy_box(target[half:], file, place + half * strides[0] * dtype.itemsize, dtype, strides)


def _read(file: int, place: int, into: Tensor) -> None:
    rest = memoryview(into.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while rest:
        got = os.preadv(file, [rest], place)
        if not got:
            raise CheckpointError(f"a file ends at byte {place}, before the {len(rest)} bytes that a tensor has there")
        rest, place = rest[got:], place + got
