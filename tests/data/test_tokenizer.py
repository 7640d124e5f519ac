"""Tokenizers: round trips, ends of documents, and where tokens begin."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lsys.data.corpus import Corpus, CorpusError
from lsys.data.prepare import PrepareArgs, prepare
from lsys.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, TokenizerError, load_tokenizer

TEXT = "the cat sat on the mat; the hat of the cat: naïve café, 10 € "


def library(path: Path, *special: str) -> str:
    """A small byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 10, trainer)
    made.save(str(path))
    return str(path)


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids, starts = tokenizer.encode_with_starts(text)
    assert bytes(ids.tolist()) == text.encode() and tokenizer.decode(ids) == text
    assert starts.tolist() == [i for i, character in enumerate(text) for _ in character.encode()]
    assert tokenizer.decode(np.append(ids.astype(np.int64), tokenizer.eod)) == text


def test_tokenizer_json_round_trip(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(library(tmp_path / "t.json", "<pad>", "</s>"))
    ids, starts = tokenizer.encode_with_starts(TEXT)
    assert tokenizer.decode(np.append(ids, tokenizer.eod)) == TEXT and len(ids) < len(TEXT.encode())
    assert ids.tolist() == tokenizer.encode(TEXT).tolist()
    assert tokenizer.eod == 1 and tokenizer.vocab > ids.max()
    for place, start in enumerate(starts[:-1]):  # text from a token's character on has that token in it first
        piece = TEXT[start : starts[place + 1]]
        assert not piece.isascii() or tokenizer.decode(ids[place : place + 1]) == piece


def test_a_tokenizers_own_truncation_is_off(tmp_path: Path) -> None:
    path = library(tmp_path / "t.json", "</s>")
    cut = Tokenizer.from_file(path)
    cut.enable_truncation(4)
    cut.enable_padding(length=512)
    cut.save(path)
    assert HuggingFaceTokenizer(path).decode(HuggingFaceTokenizer(path).encode(TEXT)) == TEXT


def test_the_end_of_documents_is_found_or_named(tmp_path: Path) -> None:
    path = library(tmp_path / "t.json", "<pad>", "<end>")
    with pytest.raises(
        TokenizerError, match=r"it has none of <\|endoftext\|>.*; name one with --eod, .*'<end>', '<pad>'"
    ):
        load_tokenizer(path)
    assert load_tokenizer(path, "<end>").eod == 1
    with pytest.raises(TokenizerError, match="it has no '<stop>'"):
        load_tokenizer(path, "<stop>")


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match="not found, and nothing is downloaded; give the path of a tokenizer.json, or bytes"
    ):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"t\.json is no tokenizer\.json"):
        load_tokenizer(str(tmp_path / "t.json"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_corpus_knows_its_tokenizer(tmp_path: Path, workers: int) -> None:
    path = library(tmp_path / "t.json", "</s>")
    rows = '{"text": "the cat sat", "spans": [[4, 7]]}\n{"text": "café", "spans": [[0, 4]]}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    out, source = tmp_path / "out", [str(tmp_path / "a.jsonl")]
    prepare(PrepareArgs(sources=source, out=out, tokenizer=path, mask_column="spans", workers=workers))
    corpus = Corpus.open(out)
    ids = corpus.read(0, 0, int(corpus.lengths[0]))
    assert (
        corpus.tokenizer.decode(ids) == "the cat sat" and ids[-1] == corpus.tokenizer.eod == corpus.description["eod"]
    )
    assert corpus.mask is not None
    marks = corpus.mask.read(0, 0, len(ids))
    _, starts = corpus.tokenizer.encode_with_starts("the cat sat")
    assert marks.tolist() == [int(4 <= start < 7) for start in starts] + [1]
    assert corpus.mask.read(1, 0, int(corpus.lengths[1])).all()
    library(tmp_path / "t.json", "<other>", "</s>")
    with pytest.raises(CorpusError, match=r"t\.json is not the tokenizer that made"):
        _ = Corpus.open(out).tokenizer


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(66_000)} | {"</s>": 66_000}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("w65999 w3")
    arguments = PrepareArgs([str(tmp_path / "a.txt")], tmp_path / "out", str(tmp_path / "t.json"), workers=1)
    prepare(arguments)
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.tokens.dtype == np.int32 and corpus.read(0, 0, 3).tolist() == [65_999, 3, 66_000]
    assert corpus.bigram_entropy is None
