"""Entropies against direct counts; what `lsys data inspect` prints."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsys.data.corpus import Corpus, CorpusError
from lsys.data.entropy import BigramCounter
from lsys.data.inspect import InspectArgs, document_text, histogram, inspect
from lsys.data.prepare import PrepareArgs, prepare


@given(st.lists(st.lists(st.integers(0, 6), max_size=30), max_size=6), st.sampled_from([1, 7, 1000]))
def test_entropies_are_those_of_the_counts(documents: list[list[int]], block: int) -> None:
    counter = BigramCounter(60_000, block)
    asked_first = copy.deepcopy(counter)
    for document in documents:
        asked_first.add(np.array(document, np.uint16) * np.uint16(9_999))
        counter.add(np.array(document, np.uint16) * np.uint16(9_999))  # ids whose product needs more than 16 bits
    pairs = Counter(pair for d in documents for pair in zip(d, d[1:], strict=False))
    total = sum(pairs.values())
    first, second = Counter[int](), Counter[int]()
    for (a, b), n in pairs.items():
        first[a] += n
        second[b] += n
    conditional = -sum(n / total * np.log(n / first[a]) for (a, _), n in pairs.items())
    assert counter.entropy() == pytest.approx(conditional, abs=1e-12)
    unigram = -sum(n / total * np.log(n / total) for n in second.values())
    assert counter.unigram_entropy() == asked_first.unigram_entropy() == pytest.approx(unigram, abs=1e-12)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_text('{"text": "abcdefg"}\n{"text": "[bold]é"}\n{"text": "x"}\n')
    prepare(PrepareArgs([str(tmp_path / "a.jsonl")], tmp_path / "out", workers=1))
    return str(tmp_path / "out")


def test_what_is_printed(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(InspectArgs(prefix, verify=True))
    seen = capsys.readouterr().out
    assert "3 documents, 19 tokens (uint16)" in seen and "vocabulary 257, end of document 256" in seen
    assert f"bigram entropy: {Corpus.open(prefix).bigram_entropy:.4f} nats" in seen
    inspect(InspectArgs(prefix, entropy=True))
    seen = capsys.readouterr().out
    assert f"bigram entropy: {Corpus.open(prefix).bigram_entropy:.4f} nats" in seen and "unigram entropy: " in seen
    inspect(InspectArgs(prefix, document=1))
    assert capsys.readouterr().out == "[bold]é\n"


def test_documents_by_length(prefix: str) -> None:
    table = histogram(Corpus.open(prefix))
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["2 to 3", "4 to 7", "8 to 15"] and cells[1] == ["1", "0", "2"]
    assert cells[3] == ["10.5", "0.0", "89.5"]


def test_documents_that_do_not_exist(prefix: str) -> None:
    corpus = Corpus.open(prefix)
    assert document_text(corpus, 0, 3) == "abc"
    for document in (-1, 3):
        with pytest.raises(CorpusError, match=f"has no document {document}; there are 0 to 2"):
            document_text(corpus, document, 3)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(CorpusError, match=r"json is missing, so its tokenizer is unknown; document 2 is \[120, 256\]"):
        document_text(Corpus.open(prefix), 2, 9)
