"""`lsys data prepare`: text to Megatron's .bin and .idx, in parallel, in order, all or nothing."""

import errno
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from lsys.data.entropy import BigramCounter
from lsys.data.source_error import SourceError
from lsys.data.sources import STDLIB, TEXT_SUFFIXES, Document, Reader, splits_of
from lsys.data.tokenizer import Tokenizer, load_tokenizer

BATCH, BATCH_SIZE = 64, 1 << 20  # documents, and about as many bytes, that a worker tokenizes at a time


@dataclass
class PrepareArgs:
    """Make a corpus: PREFIX.bin, PREFIX.idx and PREFIX.json."""

    sources: Positional[list[str]]
    """Files (text, .jsonl, .parquet), folders, Hugging Face datasets on disk, or the word stdlib: the source of Python's standard library."""
    out: Annotated[str | Path, arg(metavar="PATH")]  # a text keeps the slash at its end, which a path loses
    """Prefix of the files to write, such as data/mine."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json."""
    eod: str | None = None
    """The token that ends documents, if the tokenizer.json has none of the usual names."""
    text_column: str = "text"
    """Key (JSONL) or column (Parquet, datasets) of the text."""
    mask_column: str | None = None
    """Key or column of a list of [start, end) character ranges; only they count for the loss. Writes PREFIX.mask."""
    suffix: list[str] = field(default_factory=lambda: list(TEXT_SUFFIXES))
    """Endings of the files to take from folders, besides .jsonl and .parquet, and of other files to read as text."""
    split: str | None = None
    """Of sources that have several splits (a DatasetDict, or a folder of train-*.parquet and test-*.parquet): which to read."""
    empty: Literal["error", "skip"] = "error"
    """What to do with a document without text (stdlib: always skipped)."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """What to do with a document that is not UTF-8: refuse; put U+FFFD for what cannot be read; or leave it out."""
    workers: int = field(default_factory=lambda: max(1, len(os.sched_getaffinity(0))))
    """Processes that tokenize; the result does not depend on it."""
    overwrite: bool = False
    """Replace a corpus of that name."""

    @property
    def prefix(self) -> Path:
        """`out` as a path."""
        return Path(self.out)

    @property
    def options(self) -> list[str]:
        """What else of these decides what the corpus holds, as words of a command line, without what is left at its default."""
        one = ("eod", "text_column", "mask_column", "split", "empty", "invalid_utf8")
        defaults = {each.name: each.default for each in fields(self)}
        given = [(name, [getattr(self, name)]) for name in one if getattr(self, name) != defaults[name]]
        given += [("suffix", self.suffix)] if self.suffix != list(TEXT_SUFFIXES) else []
        return [word for name, values in given for word in (f"--{name.replace('_', '-')}", *values)]


ENDINGS = (".idx", ".bin", ".mask.idx", ".mask.bin", ".json")  # of all files that a corpus may have


class PrepareError(ValueError):
    """The corpus was not made; nothing is left of it."""


@dataclass
class Counts:
    """What was written, of all and of each source (documents, tokens), and what was left out."""

    documents: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, source: str, tokens: int) -> None:
        self.documents, self.tokens = self.documents + 1, self.tokens + tokens
        documents, before = self.sources.get(source, (0, 0))
        self.sources[source] = documents + 1, before + tokens


Encoded = tuple[str, str, NDArray[Any], NDArray[np.uint8] | None]  # source, skipped why (or ""), ids, mask


def prepare(arguments: PrepareArgs) -> Counts:
    """Tokenize and write; prints a progress bar and what was made.

    Raises:
        PrepareError, SourceError, TokenizerError: one message with the file, the rule and the remedy.
    """
    if not arguments.sources:
        raise PrepareError("no source was given; name files or folders, or stdlib")
    if arguments.workers < 1:
        raise PrepareError(f"{arguments.workers} workers tokenize nothing; --workers 1 or more")
    if arguments.prefix.is_dir() or str(arguments.out).endswith("/"):
        inside = arguments.prefix / "corpus"
        raise PrepareError(f"--out {arguments.out} is a folder; name files in it, such as --out {inside}")
    if arguments.split is not None and not any(map(splits_of, arguments.sources)):
        raise PrepareError(f"--split {arguments.split}: no source has splits; leave it out")
    existing = [f"{arguments.out}{ending}" for ending in ENDINGS if Path(f"{arguments.out}{ending}").exists()]
    if existing and not arguments.overwrite:
        raise PrepareError(f"{existing[0]} exists; take another --out, or --overwrite to replace it")
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eod)
    replace = arguments.invalid_utf8 == "replace"
    reader = Reader(tuple(arguments.suffix), arguments.text_column, arguments.mask_column, replace, arguments.split)
    files = [(source, path) for source in arguments.sources for path in reader.files(source)]
    console = Console()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    try:
        with bar:
            counts, entropy = _write(arguments, tokenizer, _batches(files, reader, bar), bar)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PrepareError(
                f"no space left on {arguments.prefix.parent} (errno 28): nothing was kept; free space, or take another --out"
            ) from None
        raise PrepareError(
            f"{arguments.out} cannot be written: {error.strerror or error}; take another --out"
        ) from None
    left_out = "".join(f"; left out: {n} {why}" for why, n in counts.skipped.items())
    console.print(
        f"{arguments.out}: {counts.documents:,} documents, {counts.tokens:,} tokens, vocabulary {tokenizer.vocab}{left_out}"
    )
    for source, (documents, tokens) in counts.sources.items() if len(counts.sources) > 1 or arguments.split else ():
        console.print(f"  {source}: {documents:,} documents, {tokens:,} tokens", markup=False)
    if entropy is not None:
        console.print(
            f"bigram entropy {entropy:.4f} nats per byte: a model that looks at one byte only can do no better"
        )
    return counts


def _batches(files: list[tuple[str, Path]], reader: Reader, bar: Progress) -> Iterator[list[tuple[str, Document]]]:
    """Documents with their source, some at a time."""
    task = bar.add_task("reading files", total=len(files))

    def documents() -> Iterator[tuple[str, Document]]:
        for source, path in files:
            for document in reader.read(path):
                yield source, document
            bar.advance(task)

    batch, size = [], 0
    for each in documents():
        batch.append(each)
        size += len(each[1].text)
        if len(batch) == BATCH or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    arguments: PrepareArgs, tokenizer: Tokenizer, batches: Iterator[Any], bar: Progress
) -> tuple[Counts, float | None]:
    counts = Counts(sources=dict.fromkeys(arguments.sources, (0, 0)))
    bigrams = BigramCounter(tokenizer.vocab) if tokenizer.spec == "bytes" else None
    with ExitStack() as stack:
        writer = stack.enter_context(_Files(arguments, tokenizer))
        for source, why, ids, mask in _encoded(arguments, tokenizer, batches):
            if why:
                counts.skipped[why] = counts.skipped.get(why, 0) + 1
                continue
            writer.add(ids, mask)
            counts.add(source, len(ids))
            if bigrams is not None:
                bigrams.add(ids)
        if not counts.documents:
            raise PrepareError(f"{', '.join(arguments.sources)}: no document with text; name other sources")
        entropy = None if bigrams is None else bigrams.entropy()
        writer.commit(counts, entropy)
    return counts, entropy


def _encoded(
    arguments: PrepareArgs, tokenizer: Tokenizer, batches: Iterable[list[tuple[str, Document]]]
) -> Iterator[Encoded]:
    """Tokenized documents in order. At most a few batches per worker are under way."""
    if arguments.workers == 1:
        for batch in batches:
            yield from _encode(batch, arguments, tokenizer)
        return
    with ProcessPoolExecutor(arguments.workers, get_context("forkserver")) as pool:
        pending: deque[Future[list[Encoded]]] = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_encode_in_worker, batch, arguments))
                if len(pending) >= 4 * arguments.workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool:
            raise PrepareError(
                "a worker was killed, as happens when memory runs out; fewer --workers need less of it"
            ) from None


_loaded = lru_cache(maxsize=1)(load_tokenizer)  # once per worker


def _encode_in_worker(batch: list[tuple[str, Document]], arguments: PrepareArgs) -> list[Encoded]:
    return _encode(batch, arguments, _loaded(arguments.tokenizer, arguments.eod))


def _encode(batch: list[tuple[str, Document]], arguments: PrepareArgs, tokenizer: Tokenizer) -> list[Encoded]:
    return [(source, *_encode_one(document, tokenizer, arguments, source)) for source, document in batch]


def _encode_one(
    document: Document, tokenizer: Tokenizer, arguments: PrepareArgs, source: str
) -> tuple[str, NDArray[Any], NDArray[np.uint8] | None]:
    nothing = np.empty(0, np.int64)
    try:
        text = document.text if isinstance(document.text, str) else document.text.decode()
        text.encode()  # JSON can spell half a surrogate pair
    except UnicodeError as error:
        if arguments.invalid_utf8 == "error" and source != STDLIB:
            raise SourceError(
                f"{document.origin} is not UTF-8: {_what_is_wrong(error)}; convert it, or choose --invalid-utf8 replace or skip"
            ) from None
        if arguments.invalid_utf8 != "replace":
            return "not UTF-8", nothing, None
        text = _replaced(document.text)
    if not text:
        if arguments.empty == "error" and source != STDLIB:
            raise SourceError(f"{document.origin} is empty; leave it out, or choose --empty skip")
        return "empty", nothing, None
    dtype = _dtype(tokenizer)
    if arguments.mask_column is None:
        return "", np.append(tokenizer.encode(text).astype(dtype), dtype(tokenizer.eod)), None
    counted = np.zeros(len(text) + 1, np.uint8)
    for start, end in document.spans if document.spans is not None else [(0, len(text))]:
        counted[start:end] = 1
    ids, characters = tokenizer.encode_with_starts(text)
    mask = np.append(counted[characters], np.uint8(1))  # the end of the document always counts
    return "", np.append(ids.astype(dtype), dtype(tokenizer.eod)), mask


def _what_is_wrong(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is 0x{error.object[error.start]:02x}"
    assert isinstance(error, UnicodeEncodeError)
    return f"character {error.start} is half a surrogate pair, U+{ord(error.object[error.start]):04X}"


def _replaced(text: bytes | str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text if isinstance(text, str) else text.decode(errors="replace"))


def _dtype(tokenizer: Tokenizer) -> type[np.uint16] | type[np.int32]:
    return np.uint16 if tokenizer.vocab < 65500 else np.int32  # Megatron's own border


class _Files(AbstractContextManager):
    """The corpus under temporary names; `commit` gives it its own, leaving the block without it removes everything."""

    def __init__(self, arguments: PrepareArgs, tokenizer: Tokenizer) -> None:
        from lsys.runtime import install_megatron

        install_megatron()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.arguments, self.tokenizer, self.dtype = arguments, tokenizer, _dtype(tokenizer)
        self.part = arguments.prefix.with_name(f".{arguments.prefix.name}.{os.getpid()}.partial")
        arguments.prefix.parent.mkdir(parents=True, exist_ok=True)
        self.builders = {"": IndexedDatasetBuilder(f"{self.part}.bin", dtype=self.dtype)}
        if arguments.mask_column:
            self.builders[".mask"] = IndexedDatasetBuilder(f"{self.part}.mask.bin", dtype=np.uint8)

    def add(self, ids: NDArray[Any], mask: NDArray[np.uint8] | None) -> None:
        if len(ids) > np.iinfo(np.int32).max:  # of the index
            raise PrepareError(f"a document of {len(ids):,} tokens is longer than 2,147,483,647; cut it in two")
        for kind, builder in self.builders.items():
            content = ids if kind == "" else mask
            assert content is not None
            builder.add_document(content, [len(content)])

    def commit(self, counts: Counts, entropy: float | None) -> None:
        from lsys.config.corpora import SIDECAR_VERSION
        from lsys.data.corpus import sha256

        for kind, builder in self.builders.items():
            builder.finalize(f"{self.part}{kind}.idx")
        endings = [e for e in ENDINGS[:-1] if Path(f"{self.part}{e}").exists()]
        description = {
            "version": SIDECAR_VERSION,
            "tokenizer": {
                "spec": self.tokenizer.spec,
                "eod_name": self.arguments.eod,
                "fingerprint": self.tokenizer.fingerprint,
            },
            "vocab": self.tokenizer.vocab,
            "eod": self.tokenizer.eod,
            "dtype": np.dtype(self.dtype).name,
            "documents": counts.documents,
            "tokens": counts.tokens,
            "skipped": counts.skipped,
            "bigram_entropy": entropy,
            "sources": self.arguments.sources,
            "options": self.arguments.options,
            "sha256": {ending: sha256(Path(f"{self.part}{ending}")) for ending in endings},
        }
        Path(f"{self.part}.json").write_text(json.dumps(description, indent=2) + "\n")
        for ending in (*endings, ".json"):
            _sync(Path(f"{self.part}{ending}"))
        for ending in ENDINGS:  # first the old index: from here until the new one is in place, there is no corpus
            Path(f"{self.arguments.out}{ending}").unlink(missing_ok=True)
        for ending in (*reversed(endings), ".json"):  # the description last: with it the corpus is whole
            os.replace(f"{self.part}{ending}", f"{self.arguments.out}{ending}")
        _sync(self.part.parent)

    def __exit__(self, *error: object) -> None:
        for builder in self.builders.values():
            with suppress(OSError):
                builder.data_file.close()
        for ending in ENDINGS:
            Path(f"{self.part}{ending}").unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """To the disk, file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
