"""A prepared corpus: Megatron's .bin and .idx, checked before they are used."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsys.config.corpora import HEAD, CorpusError, corpus_files, prepare_again

FILES, MASKS = (".bin", ".idx"), (".mask.bin", ".mask.idx")
BLOCKS, BLOCK = (
    64,
    4096,
)  # a sample of a file: so many pieces of so many bytes, evenly over it, the first and the last among them


@dataclass
class Corpus:
    """Documents of token ids, readable at any offset.

    Attributes:
        prefix: path without ending. lengths: tokens of each document, int64 [N].
        starts: first token of each document in the .bin, int64 [N].
        tokens: the .bin, mapped into memory. description: the sidecar PREFIX.json that `lsys data prepare` writes, or empty.
        mask: 0/1 for each token, whether it counts as a target; None: all do.
    """

    prefix: str
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: NDArray[Any]
    description: dict[str, Any] = field(default_factory=dict)
    mask: "Corpus | None" = None
    _verified: int = 0

    @classmethod
    def open(cls, prefix: str | Path) -> "Corpus":
        """Open PREFIX.bin and PREFIX.idx (and PREFIX.mask.*, PREFIX.json if there).

        Raises:
            CorpusError: a file is missing or truncated, or the index contradicts itself or the .bin.
        """
        prefix = str(prefix)
        lengths, tokens, description = _read(prefix)
        mask = cls.open(f"{prefix}.mask") if Path(f"{prefix}.mask.idx").exists() else None
        if mask is not None and not np.array_equal(mask.lengths, lengths):
            raise CorpusError(f"{prefix}.mask has other document lengths than {prefix}; prepare the corpus again")
        return cls(prefix, lengths, lengths.cumsum() - lengths, tokens, description, mask)

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that made the corpus, or None if the sidecar does not say."""
        from lsys.data.tokenizer import load_tokenizer

        known = self.description.get("tokenizer")
        if not known:
            return None
        loaded = load_tokenizer(known["spec"], known.get("eod_name"))
        if loaded.fingerprint != known["fingerprint"]:
            raise CorpusError(
                f"{known['spec']} is not the tokenizer that made {self.prefix}; put that one back, or prepare it again"
            )
        return loaded

    @property
    def bigram_entropy(self) -> float | None:
        """Entropy of a token given the one before, nats; counted for byte corpora when they were prepared."""
        return self.description.get("bigram_entropy")

    @cached_property
    def content(self) -> dict[str, dict[str, Any]]:
        """What the files hold, by ending: `bytes`, the SHA-256 of a `sample`, and `sha256` where the sidecar knows it; an index's is computed else.

        Files are looked at once, when it is first asked for. Raises CorpusError where one cannot be read.
        """
        endings = *FILES, *(MASKS if self.mask is not None else ())
        try:
            return {ending: self._content(ending) for ending in endings}
        except OSError as error:
            raise CorpusError(
                f"{error.filename or self.prefix} cannot be read: {error.strerror}", "put it back"
            ) from None

    def _content(self, ending: str) -> dict[str, Any]:
        path = Path(self.prefix + ending)
        found: dict[str, Any] = {"bytes": path.stat().st_size, "sample": _sample(path)}
        if whole := self.description.get("sha256", {}).get(ending) or (ending.endswith(".idx") and sha256(path)):
            found["sha256"] = whole
        return found

    def read(self, document: int, start: int, length: int) -> NDArray[np.int64]:
        """Tokens [start, start + length) of a document."""
        begin = self.starts[document] + start
        return np.asarray(self.tokens[begin : begin + length]).astype(np.int64)

    def verify_tokens(self, vocab: int, block: int = 1 << 24) -> None:
        """Refuse ids outside [0, vocab). Reads the whole .bin once."""
        if self._verified and self._verified <= vocab:
            return
        for begin in range(0, len(self.tokens), block):
            part = self.tokens[begin : begin + block]
            if part.max() >= vocab or part.min() < 0:
                at = begin + int(np.argmax((part >= vocab) | (part < 0)))
                document = int(np.searchsorted(self.starts, at, side="right")) - 1
                raise CorpusError(
                    f"{self.prefix}: token {at - self.starts[document]} of document {document} is {self.tokens[at]}, not below "
                    f"model.vocab {vocab}; raise model.vocab, or prepare the corpus with the model's tokenizer"
                )
        self._verified = vocab

    def verify_hashes(self) -> None:
        """Compare the files with the sidecar's SHA-256, where there is one."""
        for ending, known in self.description.get("sha256", {}).items():
            if sha256(Path(self.prefix + ending)) != known:
                problem = f"{self.prefix}{ending} is not what was prepared (SHA-256 differs)"
                raise CorpusError(problem, prepare_again(self.prefix, self.description))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for place in sorted({max(0, size - BLOCK) * n // (BLOCKS - 1) for n in range(BLOCKS)}):
            file.seek(place)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _read(prefix: str) -> tuple[NDArray[np.int64], NDArray[Any], dict[str, Any]]:
    """Document lengths, the mapped tokens and the description, every statement of the index checked."""
    files = corpus_files(prefix)
    header, index, again = files.header, Path(f"{prefix}.idx"), prepare_again(prefix, files.description)
    raw = index.read_bytes()
    sizes = np.frombuffer(raw, np.int32, header.sequences, HEAD).astype(np.int64)
    pointers = np.frombuffer(raw, np.int64, header.sequences, HEAD + 4 * header.sequences)
    borders = np.frombuffer(raw, np.int64, header.documents + 1, HEAD + 12 * header.sequences)
    ends = np.concatenate(([0], sizes.cumsum()))
    if (sizes < 0).any() or not np.array_equal(pointers, ends[:-1] * header.itemsize):
        raise CorpusError(f"{index}: its offsets are not the running sum of its lengths: it is damaged", again)
    if borders[0] != 0 or borders[-1] != header.sequences or (np.diff(borders) < 0).any():
        raise CorpusError(f"{index}: its documents do not cover its {header.sequences} sequences in order", again)
    return np.diff(ends[borders]), _tokens(prefix), files.description


def _tokens(prefix: str) -> NDArray[Any]:
    """The .bin through Megatron's own reader, mapped into memory."""
    from lsys.runtime import install_megatron

    install_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix, mmap=True)
    tokens = dataset.bin_reader.read(dataset.index.dtype, int(dataset.index.sequence_lengths.sum()), 0).view(_Tokens)
    tokens.dataset = dataset  # its reader closes the file when it is collected
    return tokens


class _Tokens(np.ndarray):
    """An array that keeps the dataset whose memory it shows."""

    dataset: Any = None
