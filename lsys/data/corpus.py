"""A prepared corpus: Megatron's .bin and .idx, checked before they are used."""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Megatron-core's DType codes (megatron/core/datasets/indexed_dataset.py).
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
MAGIC = b"MMIDIDX\x00\x00"
SIDECAR_VERSION = 1


class CorpusError(ValueError):
    """A corpus is missing, damaged, or does not fit the model."""


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
        lengths, tokens = _read(prefix)
        description = _sidecar(prefix)
        if description and (description["documents"], description["tokens"]) != (len(lengths), lengths.sum()):
            raise CorpusError(
                f"{prefix}.json says {description['documents']} documents and {description['tokens']} tokens, {prefix}.idx "
                f"{len(lengths)} and {lengths.sum()}: they are of two corpora; prepare it again"
            )
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
                raise CorpusError(f"{self.prefix}{ending} is not what was prepared (SHA-256 differs); prepare it again")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sidecar(prefix: str) -> dict[str, Any]:
    path = Path(f"{prefix}.json")
    if not path.exists():
        return {}  # files of Megatron's own tools have none
    try:
        description = json.loads(path.read_text())
        version, _, _ = description["version"], description["documents"], description["tokens"]
    except (ValueError, KeyError, TypeError):
        raise CorpusError(
            f"{path} is not what lsys data prepare writes; prepare the corpus again, or remove it"
        ) from None
    if version != SIDECAR_VERSION:
        raise CorpusError(
            f"{path} has format version {version}, this lsys reads {SIDECAR_VERSION}; prepare the corpus again"
        )
    return description


def _read(prefix: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Document lengths and the mapped tokens, every statement of the index checked."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise CorpusError(f"{path} not found; lsys data prepare ... --out {prefix} makes it")
    raw, again = index.read_bytes(), "prepare it again"
    head = len(MAGIC) + struct.calcsize("<QBQQ")
    if raw[: len(MAGIC)] != MAGIC:
        raise CorpusError(f"{index} is no Megatron index: it does not begin with MMIDIDX; {again}")
    if len(raw) < head:
        raise CorpusError(f"{index} is truncated: {len(raw)} bytes, its header alone has {head}; {again}")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, len(MAGIC))
    if version != 1 or code not in DTYPES:
        raise CorpusError(f"{index} has version {version} and dtype code {code}; version 1 and codes 1 to 8 are known")
    expected = head + sequences * 12 + documents * 8
    if len(raw) != expected:
        raise CorpusError(
            f"{index} has {len(raw)} bytes, its header says {expected}: it is truncated or damaged; {again}"
        )
    dtype = np.dtype(DTYPES[code])
    sizes = np.frombuffer(raw, np.int32, sequences, head).astype(np.int64)
    pointers = np.frombuffer(raw, np.int64, sequences, head + 4 * sequences)
    borders = np.frombuffer(raw, np.int64, documents, head + 12 * sequences)
    if (sizes < 0).any() or not np.array_equal(pointers, (sizes.cumsum() - sizes) * dtype.itemsize):
        raise CorpusError(f"{index}: its offsets are not the running sum of its lengths: it is damaged; {again}")
    if documents < 1 or borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
        raise CorpusError(f"{index}: its documents do not cover its {sequences} sequences in order; {again}")
    wanted = int(sizes.sum()) * dtype.itemsize
    if data.stat().st_size != wanted:
        raise CorpusError(
            f"{data} has {data.stat().st_size} bytes, its index says {wanted}: it is truncated or of another index; {again}"
        )
    if not np.issubdtype(dtype, np.integer):
        raise CorpusError(f"{index} holds {dtype} numbers; token ids are integers")
    if wanted == 0:
        raise CorpusError(f"{prefix} holds no tokens; {again} from text that is not empty")
    ends = np.concatenate(([0], sizes.cumsum()))
    return np.diff(ends[borders]), _tokens(prefix)


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
