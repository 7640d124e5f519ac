"""`lsys data prepare`: text to Megatron's .bin and .idx, in parallel, in order, all or nothing."""

import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional

from lsys.data.entropy import BigramCounter
from lsys.data.sources import TEXT_SUFFIXES, Document, Reader, SourceError
from lsys.data.tokenizer import Tokenizer, load_tokenizer

BATCH = 64  # documents that a worker tokenizes at a time


@dataclass
class PrepareArgs:
    """Make a corpus: PREFIX.bin, PREFIX.idx and PREFIX.json."""

    sources: Positional[list[str]]
    """Files (text, .jsonl, .parquet), folders, Hugging Face datasets on disk, or the word stdlib: the source of Python's standard library."""
    out: Path
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
    """Endings of the files to take from folders, besides .jsonl and .parquet."""
    empty: Literal["error", "skip"] = "error"
    """What to do with a document without text (stdlib: always skipped)."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """What to do with a file that is not UTF-8: refuse; put U+FFFD for what cannot be read; or leave it out."""
    workers: int = field(default_factory=lambda: max(1, len(os.sched_getaffinity(0))))
    """Processes that tokenize; the result does not depend on it."""
    overwrite: bool = False
    """Replace a corpus of that name."""


class PrepareError(ValueError):
    """The corpus was not made; nothing is left of it."""


@dataclass
class Counts:
    """What was written and what was left out."""

    documents: int = 0
    tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


Encoded = tuple[str, NDArray[np.int64], NDArray[np.uint8] | None]  # skipped why (or ""), ids, mask


def prepare(arguments: PrepareArgs) -> Counts:
    """Tokenize and write; prints a progress bar and what was made.

    Raises:
        PrepareError, SourceError, TokenizerError: one message with the file, the rule and the remedy.
    """
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eod)
    if not arguments.sources:
        raise PrepareError("no source was given; name files or folders, or stdlib")
    existing = [f"{arguments.out}{e}" for e in (".bin", ".idx") if Path(f"{arguments.out}{e}").exists()]
    if existing and not arguments.overwrite:
        raise PrepareError(f"{existing[0]} exists; take another --out, or --overwrite to replace it")
    reader = Reader(tuple(arguments.suffix), arguments.text_column, arguments.mask_column)
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
                f"no space left on {arguments.out.parent} (errno 28): nothing was kept; free space, or take another --out"
            ) from None
        raise PrepareError(f"{arguments.out} cannot be written: {error.strerror or error}") from None
    left_out = "".join(f"; left out: {n} {why}" for why, n in counts.skipped.items())
    console.print(
        f"{arguments.out}: {counts.documents:,} documents, {counts.tokens:,} tokens, vocabulary {tokenizer.vocab}{left_out}"
    )
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

    each = documents()
    while batch := list(itertools.islice(each, BATCH)):
        yield batch


def _write(
    arguments: PrepareArgs, tokenizer: Tokenizer, batches: Iterator[Any], bar: Progress
) -> tuple[Counts, float | None]:
    counts = Counts()
    bigrams = BigramCounter(tokenizer.vocab) if tokenizer.spec == "bytes" else None
    with ExitStack() as stack:
        writer = stack.enter_context(_Files(arguments, tokenizer))
        for why, ids, mask in _encoded(arguments, batches):
            if why:
                counts.skipped[why] = counts.skipped.get(why, 0) + 1
                continue
            writer.add(ids, mask)
            counts.documents, counts.tokens = counts.documents + 1, counts.tokens + len(ids)
            if bigrams is not None:
                bigrams.add(ids)
        if not counts.documents:
            raise PrepareError(f"{', '.join(arguments.sources)}: no document with text; name other sources")
        entropy = None if bigrams is None else bigrams.entropy()
        writer.commit(counts, entropy)
    return counts, entropy


def _encoded(arguments: PrepareArgs, batches: Iterable[list[tuple[str, Document]]]) -> Iterator[Encoded]:
    """Tokenized documents in order. At most a few batches per worker are under way."""
    if arguments.workers == 1:
        for batch in batches:
            yield from _encode(batch, arguments)
        return
    with ProcessPoolExecutor(arguments.workers, get_context("forkserver")) as pool:
        pending, batches = [], iter(batches)
        for batch in batches:
            pending.append(pool.submit(_encode, batch, arguments))
            if len(pending) >= 4 * arguments.workers:
                yield from pending.pop(0).result()
        for future in pending:
            yield from future.result()


def _encode(batch: list[tuple[str, Document]], arguments: PrepareArgs) -> list[Encoded]:
    """A worker's task; the tokenizer is loaded once per process."""
    tokenizer = _tokenizer(arguments.tokenizer, arguments.eod)
    return [_encode_one(document, tokenizer, arguments, source) for source, document in batch]


_tokenizers: dict[tuple[str, str | None], Tokenizer] = {}


def _tokenizer(spec: str, eod: str | None) -> Tokenizer:
    if (spec, eod) not in _tokenizers:
        _tokenizers[spec, eod] = load_tokenizer(spec, eod)
    return _tokenizers[spec, eod]


def _encode_one(document: Document, tokenizer: Tokenizer, arguments: PrepareArgs, source: str) -> Encoded:
    nothing = np.empty(0, np.int64)
    try:
        text = document.text if isinstance(document.text, str) else document.text.decode()
    except UnicodeDecodeError as error:
        if arguments.invalid_utf8 == "error" and source != "stdlib":
            raise SourceError(
                f"{document.origin} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; convert it, or choose "
                "--invalid-utf8 replace or skip"
            ) from None
        if arguments.invalid_utf8 != "replace":
            return "not UTF-8", nothing, None
        text = document.text.decode(errors="replace")  # type: ignore[union-attr]
    if not text:
        if arguments.empty == "error" and source != "stdlib":
            raise SourceError(f"{document.origin} is empty; leave it out, or choose --empty skip")
        return "empty", nothing, None
    ids, characters = tokenizer.encode(text)
    mask = None
    if document.spans is not None:
        counted = np.zeros(len(text) + 1, np.uint8)
        for start, end in document.spans:
            counted[start:end] = 1
        mask = np.append(counted[characters], np.uint8(1))  # the end of the document always counts
    return "", np.append(ids, tokenizer.eod), mask


class _Files(AbstractContextManager):
    """The corpus under temporary names; `commit` gives it its own, leaving the block without it removes everything."""

    def __init__(self, arguments: PrepareArgs, tokenizer: Tokenizer) -> None:
        from lsys.runtime import install_megatron

        install_megatron()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.arguments, self.tokenizer = arguments, tokenizer
        self.dtype = np.uint16 if tokenizer.vocab < 65500 else np.int32  # Megatron's own border
        self.part = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}.partial")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        self.builders = {"": IndexedDatasetBuilder(f"{self.part}.bin", dtype=self.dtype)}
        if arguments.mask_column:
            self.builders[".mask"] = IndexedDatasetBuilder(f"{self.part}.mask.bin", dtype=np.uint8)

    def add(self, ids: NDArray[np.int64], mask: NDArray[np.uint8] | None) -> None:
        for kind, builder in self.builders.items():
            content = ids if kind == "" else mask
            assert content is not None
            builder.add_document(content, [len(content)])

    def commit(self, counts: Counts, entropy: float | None) -> None:
        from lsys.data.corpus import SIDECAR_VERSION, sha256

        endings = []
        for kind, builder in self.builders.items():
            builder.finalize(f"{self.part}{kind}.idx")
            endings += [f"{kind}.bin", f"{kind}.idx"]
        description = {
            "version": SIDECAR_VERSION,
            "tokenizer": {
                "spec": self.tokenizer.spec,
                "eod_name": self.arguments.eod,
                "fingerprint": self.tokenizer.fingerprint,
            },
            "vocab": self.tokenizer.vocab,
            "eod": self.tokenizer.eod,
            "documents": counts.documents,
            "tokens": counts.tokens,
            "skipped": counts.skipped,
            "bigram_entropy": entropy,
            "sources": self.arguments.sources,
            "sha256": {ending: sha256(Path(f"{self.part}{ending}")) for ending in endings},
        }
        Path(f"{self.part}.json").write_text(json.dumps(description, indent=2) + "\n")
        for ending in (*endings, ".json"):
            with Path(f"{self.part}{ending}").open("rb") as file:
                os.fsync(file.fileno())
        for ending in (*reversed(endings), ".json"):  # the description last: with it the corpus is whole
            os.replace(f"{self.part}{ending}", f"{self.arguments.out}{ending}")

    def __exit__(self, *error: object) -> None:
        for builder in self.builders.values():
            with suppress(OSError):
                builder.data_file.close()
        for leftover in self.part.parent.glob(f"{self.part.name}*"):
            leftover.unlink(missing_ok=True)
