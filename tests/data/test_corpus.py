"""Corpora are checked before they are used: what is damaged is refused with what is wrong and what to do."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsys.data.corpus import Corpus, CorpusError
from lsys.runtime import install_megatron

SEQUENCES: tuple[list[int], ...] = ([5, 6, 7], [8], [], [9, 10, 11, 12], [13, 14])
BORDERS = (2, 3, 5)  # documents of 4, 0 and 6 tokens


def build(prefix: Path, dtype: type = np.uint16) -> str:
    """A corpus by Megatron's own writer: documents of several sequences, no sidecar."""
    install_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for first, last in zip((0, *BORDERS), BORDERS, strict=False):
        sequences = SEQUENCES[first:last]
        builder.add_document(np.concatenate(sequences).astype(dtype), [len(s) for s in sequences])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return build(tmp_path / "c")


def patch(path: str, offset: int, value: bytes) -> None:
    raw = bytearray(Path(path).read_bytes())
    raw[offset : offset + len(value)] = value
    Path(path).write_bytes(raw)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint8])
def test_documents_of_several_sequences(tmp_path: Path, dtype: type) -> None:
    corpus = Corpus.open(build(tmp_path / "c", dtype))
    assert corpus.lengths.tolist() == [4, 0, 6] and corpus.documents == 3
    assert corpus.read(0, 0, 4).tolist() == [5, 6, 7, 8]  # across sequences
    assert corpus.read(2, 3, 2).tolist() == [12, 13] and corpus.read(2, 3, 2).dtype == np.int64
    assert corpus.read(1, 0, 0).tolist() == []
    assert corpus.tokenizer is None and corpus.bigram_entropy is None and corpus.mask is None


HEADER, SIZES = 9, 34  # where version and lengths are
DAMAGE: dict[str, tuple[Callable[[str], object], str]] = {
    "no bin": (lambda p: Path(f"{p}.bin").unlink(), r"c\.bin not found; lsys data prepare .* makes it"),
    "no idx": (lambda p: Path(f"{p}.idx").unlink(), r"c\.idx not found; lsys data prepare"),
    "other file": (lambda p: Path(f"{p}.idx").write_bytes(b"x" * 100), "does not begin with MMIDIDX"),
    "empty idx": (lambda p: Path(f"{p}.idx").write_bytes(b""), "does not begin with MMIDIDX"),
    "header cut": (lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes()[:20]), "20 bytes, its header"),
    "version": (lambda p: patch(f"{p}.idx", HEADER, struct.pack("<Q", 2)), "version 2 and dtype code 8"),
    "dtype": (lambda p: patch(f"{p}.idx", HEADER + 8, b"\x63"), "version 1 and dtype code 99"),
    "float": (lambda p: patch(f"{p}.idx", HEADER + 8, b"\x07"), "holds float32 numbers: token ids are integers"),
    "count": (lambda p: patch(f"{p}.idx", HEADER + 9, struct.pack("<Q", 6)), "has 126 bytes, its header says 138"),
    "idx cut": (lambda p: Path(f"{p}.idx").write_bytes(Path(f"{p}.idx").read_bytes()[:-3]), "its header says 126"),
    "length": (lambda p: patch(f"{p}.idx", SIZES, struct.pack("<i", 2)), "offsets are not the running sum"),
    "negative": (lambda p: patch(f"{p}.idx", SIZES, struct.pack("<i", -3)), "offsets are not the running sum"),
    "last length": (
        lambda p: patch(f"{p}.idx", SIZES + 16, struct.pack("<i", 9)),
        "bin has 20 bytes, its index says 34",
    ),
    "pointer": (lambda p: patch(f"{p}.idx", SIZES + 20 + 8, struct.pack("<q", 8)), "offsets are not the running sum"),
    "border": (
        lambda p: patch(f"{p}.idx", SIZES + 60 + 8, struct.pack("<q", 4)),
        "do not cover its 5 sequences in order",
    ),
    "first border": (lambda p: patch(f"{p}.idx", SIZES + 60, struct.pack("<q", 1)), "do not cover its 5 sequences"),
    "last border": (lambda p: patch(f"{p}.idx", SIZES + 84, struct.pack("<q", 6)), "do not cover its 5 sequences"),
    "bin cut": (
        lambda p: Path(f"{p}.bin").write_bytes(b"x" * 13),
        "bin has 13 bytes, its index says 20: it is truncated",
    ),
    "bin long": (lambda p: Path(f"{p}.bin").write_bytes(b"x" * 22), "bin has 22 bytes, its index says 20"),
    "sidecar text": (lambda p: Path(f"{p}.json").write_text("{"), "is not what lsys data prepare writes"),
    "sidecar list": (lambda p: Path(f"{p}.json").write_text("[]"), "is not what lsys data prepare writes"),
    "sidecar keys": (lambda p: Path(f"{p}.json").write_text('{"version": 1}'), "is not what lsys data prepare writes"),
    "sidecar count": (
        lambda p: Path(f"{p}.json").write_text('{"version": 1, "documents": 3, "tokens": 10, "vocab": "257"}'),
        "is not what lsys data prepare writes",
    ),
    "sidecar version": (
        lambda p: Path(f"{p}.json").write_text('{"version": 9, "documents": 3, "tokens": 10}'),
        "format version 9, this lsys reads 1",
    ),
    "other sidecar": (
        lambda p: Path(f"{p}.json").write_text('{"version": 1, "documents": 3, "tokens": 11}'),
        "json says 3 documents and 11 tokens, .*idx 3 and 10: they are of two corpora",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(prefix: str, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    Corpus.open(prefix)
    break_it(prefix)
    with pytest.raises(CorpusError, match=message):
        Corpus.open(prefix)


def test_a_negative_length_is_refused_even_where_offsets_agree(prefix: str) -> None:
    sizes = np.array([-3, 7, 0, 4, 2])
    patch(f"{prefix}.idx", SIZES, sizes.astype(np.int32).tobytes())
    patch(f"{prefix}.idx", SIZES + 20, (2 * (sizes.cumsum() - sizes)).tobytes())
    with pytest.raises(CorpusError, match="offsets are not the running sum"):
        Corpus.open(prefix)


def test_a_corpus_without_tokens_is_refused(tmp_path: Path) -> None:
    install_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    IndexedDatasetBuilder(f"{tmp_path}/c.bin", dtype=np.uint16).finalize(f"{tmp_path}/c.idx")
    with pytest.raises(CorpusError, match="holds no tokens"):
        Corpus.open(tmp_path / "c")


def test_ids_outside_the_vocabulary_are_named(prefix: str) -> None:
    corpus = Corpus.open(prefix)
    corpus.verify_tokens(15)
    with pytest.raises(CorpusError, match=r"token 4 of document 2 is 13, not below model\.vocab 13; raise"):
        corpus.verify_tokens(13, block=3)
    with pytest.raises(CorpusError, match=r"token 0 of document 0 is 5"):
        corpus.verify_tokens(5)


def test_negative_ids_are_named(tmp_path: Path) -> None:
    prefix = build(tmp_path / "c", np.int32)
    patch(f"{prefix}.bin", 4, struct.pack("<i", -1))
    with pytest.raises(CorpusError, match="token 1 of document 0 is -1"):
        Corpus.open(prefix).verify_tokens(100)


def test_a_mask_has_the_shape_of_its_corpus(prefix: str, tmp_path: Path) -> None:
    build(tmp_path / "c.mask", np.uint8)
    mask = Corpus.open(prefix).mask
    assert mask is not None and mask.lengths.tolist() == [4, 0, 6]
    install_megatron()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.mask.bin", dtype=np.uint8)
    builder.add_document(np.ones(10, np.uint8), [10])
    builder.finalize(f"{prefix}.mask.idx")
    with pytest.raises(CorpusError, match=r"c\.mask has other document lengths"):
        Corpus.open(prefix)


def test_a_changed_byte_is_found_by_its_hash(prefix: str) -> None:
    from lsys.data.corpus import sha256

    known = {ending: sha256(Path(prefix + ending)) for ending in (".bin", ".idx")}
    sidecar = {"version": 1, "documents": 3, "tokens": 10, "sha256": known}
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    Corpus.open(prefix).verify_hashes()
    patch(f"{prefix}.bin", 3, b"\x01")
    with pytest.raises(CorpusError, match=r"c\.bin is not what was prepared"):
        Corpus.open(prefix).verify_hashes()
