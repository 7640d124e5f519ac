"""Where text comes from: files, folders, JSONL, Parquet, Hugging Face datasets on disk, and the standard library of the running Python."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".c",
    ".h",
    ".cpp",
    ".cu",
    ".java",
    ".js",
    ".ts",
    ".rs",
    ".go",
    ".tex",
    ".html",
)
STDLIB = "stdlib"


class SourceError(ValueError):
    """Text cannot be read as asked."""


@dataclass(frozen=True)
class Document:
    """One document before tokenization.

    Attributes:
        origin: file and line or row, for messages. text: bytes, or text where the format is text already.
        spans: [start, end) character ranges that count for the loss; None: all of it.
    """

    origin: str
    text: bytes | str
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Reader:
    """How sources are read.

    Attributes:
        suffixes: endings of files taken from folders. text: key or column of the text. mask: of the spans, or None.
    """

    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    text: str = "text"
    mask: str | None = None

    def files(self, source: str) -> list[Path]:
        """The files of a source, in an order that does not depend on the machine.

        Raises:
            SourceError: it does not exist, or holds nothing to read.
        """
        if source == STDLIB:
            return stdlib_files()
        path = Path(source)
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise SourceError(f"source {source} does not exist; name a file, a folder, or {STDLIB}")
        if _is_dataset(path):
            return sorted(path.rglob("*.arrow"))
        known = (*self.suffixes, ".jsonl", ".parquet")
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in known)
        if not found:
            raise SourceError(
                f"folder {source} holds no file that ends in {', '.join(known)}; name other endings with --suffix"
            )
        return found

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file."""
        if path.suffix == ".jsonl":
            return self._jsonl(path)
        if path.suffix == ".parquet":
            return self._table(path, _parquet(path))
        if path.suffix == ".arrow":
            return self._table(path, _arrow(path))
        return iter([Document(str(path), path.read_bytes())])

    def _jsonl(self, path: Path) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise SourceError(
                        f"{path}, line {number}: not JSON: {error}; each line must be one JSON object"
                    ) from None
                if not isinstance(row, dict):
                    raise SourceError(
                        f"{path}, line {number}: {type(row).__name__}, not an object with the key {self.text!r}"
                    )
                yield self._document(f"{path}, line {number}", row)

    def _table(self, path: Path, batches: Iterator[Any]) -> Iterator[Document]:
        number = 0
        for batch in batches:
            names = [name for name in (self.text, self.mask) if name]
            for name in names:
                if name not in batch.schema.names:
                    raise SourceError(f"{path} has no column {name!r}; it has {', '.join(batch.schema.names)}")
            for row in batch.select(names).to_pylist():
                yield self._document(f"{path}, row {number}", row)
                number += 1

    def _document(self, origin: str, row: dict[str, Any]) -> Document:
        for name in (self.text, self.mask):
            if name and name not in row:
                raise SourceError(f"{origin}: no key {name!r}; there are {', '.join(map(str, row))}")
        text = row[self.text]
        if not isinstance(text, str):
            raise SourceError(
                f"{origin}: {self.text!r} is {type(text).__name__}, not text; name another with --text-column"
            )
        spans = None if self.mask is None else tuple((int(start), int(end)) for start, end in row[self.mask])
        return Document(origin, text, spans)


def stdlib_files() -> list[Path]:
    """The running Python's standard library: real text on every machine, from empty files to hundreds of kilobytes."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def _is_dataset(path: Path) -> bool:
    """Whether a folder is what Hugging Face's `save_to_disk` writes (one split, or a dictionary of them)."""
    return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        yield from parquet.ParquetFile(path).iter_batches(batch_size=256)
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path} is no Parquet file: {error}") from None


def _arrow(path: Path) -> Iterator[Any]:
    """`datasets` writes Arrow streams; older versions, Arrow files."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as memory:
        try:
            yield from ipc.open_stream(memory)
        except pyarrow.ArrowInvalid:
            try:
                reader = ipc.open_file(memory)
            except pyarrow.ArrowInvalid as error:
                raise SourceError(f"{path} holds no Arrow stream or file: {error}") from None
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
