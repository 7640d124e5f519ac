"""Where text comes from: files, folders, JSONL, Parquet, Hugging Face datasets on disk, and the standard library of the running Python."""

import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsys.data.saved_dataset import dataset_files, dataset_splits, is_dataset
from lsys.data.source_error import SourceError, absent, unreadable

TEXT_SUFFIXES = tuple(".txt .md .rst .py .c .h .cpp .cu .java .js .ts .rs .go .tex .html".split())
TABLES = (".jsonl", ".parquet", ".arrow")
STDLIB = "stdlib"
SPLIT = re.compile(r"(train|validation|valid|val|dev|test|eval)([-_.]|$)")  # how files of a split are called


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
        split: of sources that have several, the one that is read.
    """

    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    text: str = "text"
    mask: str | None = None
    replace: bool = False
    split: str | None = None

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
                raise SourceError(unreadable(path, known))
            return [path]
        if not path.is_dir():
            raise SourceError(absent(source))
        if path.joinpath("dataset_dict.json").exists():
            return dataset_files(path / self._chosen(source, dataset_splits(path)))
        if is_dataset(path):
            return dataset_files(path)
        known = (*self.suffixes, ".jsonl", ".parquet")
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in known)
        if not found:
            others = Counter(p.suffix for p in path.rglob("*") if p.is_file() and p.suffix)
            there = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(5))
            raise SourceError(
                f"folder {source} holds no file that ends in {', '.join(known)}{f', but {there}' * bool(there)}; "
                "name other endings with --suffix"
            )
        splits = {p: name[1] for p in found if p.suffix in TABLES and (name := SPLIT.match(p.name))}
        if len(names := sorted(set(splits.values()))) > 1:
            chosen = self._chosen(source, names)
            return [p for p in found if splits.get(p) == chosen]
        return found

    def _chosen(self, source: str, splits: Sequence[str]) -> str:
        """The split to read of those that a source has."""
        if self.split in splits or (self.split is None and len(splits) == 1):
            return self.split or splits[0]
        there = f"{source} has the splits {', '.join(splits)}"
        if self.split is None:
            fix = f"name one with --split, such as --split {'train' if 'train' in splits else splits[0]}"
            raise SourceError(f"{there}, and a corpus of all would train on what is to be tested with; {fix}")
        raise SourceError(f"{there}, and none that is called {self.split}; --split takes one of these")

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
                    texts = {field.name: str(field.type) in ("string", "large_string") for field in batch.schema}
                    raise SourceError(f"{path} has no column {name!r}; {self._columns_there('it has', name, texts)}")
            for row in batch.select(self._columns).to_pylist():
                yield self._document(f"{path}, row {number}", row)
                number += 1

    def _columns_there(self, there: str, name: str, is_text: Mapping[str, bool]) -> str:
        """The keys or columns that there are, and the option that names the one that is meant."""
        option = "--text-column" if name == self.text else "--mask-column"
        fits = [key for key, text in is_text.items() if text == (name == self.text)]
        return f"{there} {', '.join(is_text)}: name one with {option}{f' {fits[0]}' if len(fits) == 1 else ''}"

    def _document(self, origin: str, row: dict[str, Any]) -> Document:
        for name in self._columns:
            if name not in row:
                texts = {str(key): isinstance(value, str) for key, value in row.items()}
                raise SourceError(f"{origin}: no key {name!r}; {self._columns_there('there are', name, texts)}")
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


def splits_of(source: str) -> list[str]:
    """The names of the splits that a source has: of a DatasetDict, or of tables in a folder that are called by them; else none."""
    path = Path(source)
    if path.joinpath("dataset_dict.json").exists():
        return dataset_splits(path)
    if not path.is_dir() or is_dataset(path):
        return []
    names = {name[1] for p in path.rglob("*") if p.suffix in TABLES and (name := SPLIT.match(p.name))}
    return sorted(names) if len(names) > 1 else []


def _parquet(path: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            known = set(columns) <= set(file.schema_arrow.names)  # else its columns are shown in a message
            yield from file.iter_batches(batch_size=256, columns=columns if known else None)
    except pyarrow.ArrowInvalid as error:
        raise SourceError(f"{path} is no Parquet file: {error}; copy or write it again") from None


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
                raise SourceError(f"{path} holds no Arrow stream or file: {error}; copy or save it again") from None
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
