"""Where text comes from: files, folders, JSONL, Parquet, Hugging Face datasets on disk, and the standard library of the running Python."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_SUFFIXES = tuple(".txt .md .rst .py .c .h .cpp .cu .java .js .ts .rs .go .tex .html".split())
TABLES = (".jsonl", ".parquet", ".arrow")
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
        replace: put U+FFFD for what is not UTF-8 in a JSONL line; otherwise such a line is handed on as it is.
    """

    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    text: str = "text"
    mask: str | None = None
    replace: bool = False

    @property
    def _columns(self) -> list[str]:
        return [name for name in (self.text, self.mask) if name]

    def files(self, source: str) -> list[Path]:
        """The files of a source, in an order that does not depend on the machine.

        Raises:
            SourceError: it does not exist, holds nothing to read, or its ending says that it is no text.
        """
        if source == STDLIB:
            return stdlib_files()
        path = Path(source)
        if path.is_file():
            known = (*self.suffixes, *TEXT_SUFFIXES, *TABLES)
            if path.suffix and path.suffix not in known:
                raise SourceError(
                    f"{source} ends in {path.suffix}, which is none of {', '.join(dict.fromkeys(known))}; "
                    f"--suffix {path.suffix} reads it as one document of text"
                )
            return [path]
        if not path.is_dir():
            raise SourceError(f"source {source} does not exist; name a file, a folder, or {STDLIB}")
        if _is_dataset(path):
            return _dataset_files(path)
        known = (*self.suffixes, ".jsonl", ".parquet")
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in known)
        if not found:
            raise SourceError(
                f"folder {source} holds no file that ends in {', '.join(known)}; name other endings with --suffix"
            )
        return found

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file.

        Raises:
            SourceError: it cannot be read, or is not what its ending says.
        """
        try:
            yield from self._read(path)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror or error}") from None

    def _read(self, path: Path) -> Iterator[Document]:
        if path.suffix == ".jsonl":
            return self._jsonl(path)
        if path.suffix == ".parquet":
            return self._table(path, _parquet(path, self._columns))
        if path.suffix == ".arrow":
            return self._table(path, _arrow(path))
        return iter([Document(str(path), path.read_bytes())])

    def _jsonl(self, path: Path) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    content = line.decode(errors="replace" if self.replace else "strict")
                except UnicodeDecodeError:
                    yield Document(f"{path}, line {number}", line)  # refused or left out where all text is decoded
                    continue
                try:
                    row = json.loads(content)
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
            for name in self._columns:
                if name not in batch.schema.names:
                    raise SourceError(f"{path} has no column {name!r}; it has {', '.join(batch.schema.names)}")
            for row in batch.select(self._columns).to_pylist():
                yield self._document(f"{path}, row {number}", row)
                number += 1

    def _document(self, origin: str, row: dict[str, Any]) -> Document:
        for name in self._columns:
            if name not in row:
                raise SourceError(f"{origin}: no key {name!r}; there are {', '.join(map(str, row))}")
        text = row[self.text]
        if not isinstance(text, str):
            raise SourceError(
                f"{origin}: {self.text!r} is {type(text).__name__}, not text; name another with --text-column"
            )
        return Document(origin, text, None if self.mask is None else _spans(origin, self.mask, row[self.mask], text))


def _spans(origin: str, name: str, value: Any, text: str) -> tuple[tuple[int, int], ...]:
    try:
        spans = tuple((start, end) for start, end in value)
        if all(type(start) is type(end) is int and 0 <= start <= end <= len(text) for start, end in spans):
            return spans
    except (TypeError, ValueError):
        pass
    raise SourceError(
        f"{origin}: {name!r} is {str(value)[:80]}, not a list of [start, end) ranges within its {len(text)} characters"
    )


def stdlib_files() -> list[Path]:
    """The running Python's standard library: real text on every machine, from empty files to hundreds of kilobytes."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))


def _is_dataset(path: Path) -> bool:
    """Whether a folder is what Hugging Face's `save_to_disk` writes (one split, or a dictionary of them)."""
    return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _dataset_files(path: Path) -> list[Path]:
    """The Arrow files that the dataset's own lists name: beside them may lie caches, which repeat its rows."""
    found: list[Path] = []
    for state in sorted(path.rglob("state.json")):
        try:
            found += [state.parent / each["filename"] for each in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise SourceError(f"{state} does not list the dataset's files; save the dataset again") from None
    if not found:
        found = sorted(p for p in path.rglob("*.arrow") if not p.name.startswith("cache-"))
    missing = [each for each in found if not each.is_file()]
    if missing or not found:
        absent = f"{missing[0]} is missing" if missing else "it holds no Arrow file"
        raise SourceError(f"dataset {path} is not whole: {absent}; save it again with save_to_disk")
    return found


def _parquet(path: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            known = set(columns) <= set(file.schema_arrow.names)  # else its columns are shown in a message
            yield from file.iter_batches(batch_size=256, columns=columns if known else None)
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
