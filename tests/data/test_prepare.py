"""Preparation: every kind of source, what is refused and with which remedy, the same files for any number of workers, all or nothing."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from support.texts import arrow, dataset, lines, make, texts, write

from lsys.data.corpus import Corpus
from lsys.data.prepare import PrepareError
from lsys.data.source_error import SourceError
from lsys.data.sources import Reader, stdlib_files


def test_every_kind_of_source(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["p0", "p1"], "n": [1, 2]}), tmp_path / "p.parquet")
    folder = tmp_path / "folder"
    write(folder / "b.txt", "b")
    write(folder / "a" / "z.md", "z")
    write(folder / "a.bin", b"\xff\x00")  # no ending of text: left alone
    lines(folder / "c.jsonl", {"text": "c0"}, {"text": "c1", "other": 1})
    saved = dataset(tmp_path / "saved", ["d0", "d1"], ["d2"])
    arrow(saved / "cache-0123.arrow", ["repeated"])  # what `datasets` leaves beside its files
    write(tmp_path / "x", "é no ending")
    counts = make(tmp_path / "out", tmp_path / "p.parquet", folder, saved, tmp_path / "x")
    assert texts(tmp_path / "out") == ["p0", "p1", "z", "b", "c0", "c1", "d0", "d1", "d2", "é no ending"]
    assert counts.documents == 10 and counts.skipped == {}
    assert counts.tokens == Corpus.open(tmp_path / "out").lengths.sum()


def test_the_sidecar_says_what_was_made(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "abab")
    make(tmp_path / "out", tmp_path / "a.txt")
    corpus = Corpus.open(tmp_path / "out")
    said = {key: corpus.description[key] for key in ("vocab", "eod", "dtype", "documents", "tokens", "sources")}
    assert said == dict(vocab=257, eod=256, dtype="uint16", documents=1, tokens=5, sources=[str(tmp_path / "a.txt")])
    assert corpus.tokens.dtype == np.uint16 and corpus.tokenizer.decode(corpus.read(0, 0, 5)) == "abab"
    corpus.verify_hashes()
    # pairs ab, ba, ab, b-end: after b comes a or the end
    assert corpus.bigram_entropy == pytest.approx(0.5 * np.log(2))


def test_workers_change_nothing(tmp_path: Path) -> None:
    rows = [{"text": f"document {i} " * (i % 40 + 1)} for i in range(300)]
    lines(tmp_path / "a.jsonl", *rows, {"text": "x" * 3_000_000}, *rows)
    for workers in (1, 2, 3):
        make(tmp_path / f"out{workers}", tmp_path / "a.jsonl", workers=workers)
    for ending in (".bin", ".idx"):
        first, *others = (Path(f"{tmp_path}/out{w}{ending}").read_bytes() for w in (1, 2, 3))
        assert all(other == first for other in others)
    assert texts(tmp_path / "out3")[:300] == [row["text"] for row in rows]


def test_the_standard_library_is_a_corpus() -> None:
    files = stdlib_files()
    names = {str(file) for file in files}
    assert len(files) > 500 and json.__file__ in names and files == sorted(files)
    assert not any("site-packages" in name or "__pycache__" in name for name in names)


@pytest.mark.parametrize(
    "content, options, message",
    [
        (None, {}, r"source .*a\.txt does not exist; name a file, a folder, or stdlib"),
        ("", {}, r"a\.txt is empty; leave it out, or choose --empty skip"),
        (b"ab\xffc", {}, r"a\.txt is not UTF-8: byte 2 is 0xff; .* --invalid-utf8 replace or skip"),
        ("", {"empty": "skip"}, "no document with text"),
        ("a", {"workers": 0}, "0 workers tokenize nothing"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, content: Any, options: dict[str, Any], message: str) -> None:
    if content is not None:
        write(tmp_path / "a.txt", content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "out", tmp_path / "a.txt", **options)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON: Expecting value"),
        ('{"text": "a"}\n[1]\n', r"line 2: list, not an object with the key 'text'"),
        ('{"body": "a", "id": 1}\n', r"line 1: no key 'text'; there are body, id"),
        ('{"text": 3}\n', r"line 1: 'text' is int, not text; name another with --text-column"),
        ('{"text": "a"}\n\n{"text": ""}\n', r"line 3 is empty"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2 is not UTF-8: byte 10 is 0xe9"),
        (r'{"text": "a\ud800"}', r"line 1 is not UTF-8: character 1 is half a surrogate pair, U\+D800"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_refused(tmp_path: Path, content: Any, message: str, workers: int) -> None:
    write(tmp_path / "a.jsonl", content)
    with pytest.raises(SourceError, match=message):
        make(tmp_path / "out", tmp_path / "a.jsonl", workers=workers)
    assert not list(tmp_path.glob("*out*"))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    for name, content, message in [
        ("a.csv", "a,b", r"a\.csv ends in \.csv, which is none of .*; --suffix \.csv reads it as one document"),
        ("a.parquet", "no", r"a\.parquet is no Parquet file"),
        ("a.arrow", "no", r"a\.arrow holds no Arrow stream or file"),
    ]:
        with pytest.raises(SourceError, match=message):
            make(tmp_path / "out", write(tmp_path / name, content))
    make(tmp_path / "out", tmp_path / "a.csv", suffix=[".csv"])
    assert texts(tmp_path / "out") == ["a,b"]
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"b\.parquet has no column 'text'; it has body"):
        make(tmp_path / "other", tmp_path / "b.parquet")
    write(tmp_path / "folder" / "a.xyz", "a")
    with pytest.raises(SourceError, match=r"holds no file that ends in .*; name other endings with --suffix"):
        make(tmp_path / "other", tmp_path / "folder")
    (dataset(tmp_path / "saved", ["a"], ["b"]) / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(SourceError, match=r"is not whole: .*data-00001-of-00002\.arrow is missing"):
        make(tmp_path / "other", tmp_path / "saved")
    with pytest.raises(PrepareError, match="no source was given"):
        make(tmp_path / "other")


def test_what_is_left_out_or_replaced_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = b'{"text": "a"}\n{"text": ""}\n{"text": "b\xff"}\n{"text": "c\\ud800"}\n'
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.txt", b"d\xffe")
    sources = tmp_path / "a.jsonl", tmp_path / "b.txt"
    skipped = make(tmp_path / "skip", *sources, empty="skip", invalid_utf8="skip").skipped
    assert texts(tmp_path / "skip") == ["a"] and skipped == {"empty": 1, "not UTF-8": 3}
    told = " ".join(capsys.readouterr().out.split())
    assert "left out: 1 empty; left out: 3 not UTF-8" in told
    assert "a.jsonl:1documents,2tokens" in "".join(
        told.split()
    )  # of each, where there are several; long lines are broken
    make(tmp_path / "one", tmp_path / "a.jsonl", empty="skip", invalid_utf8="skip")
    assert "a.jsonl:" not in "".join(capsys.readouterr().out.split())
    make(tmp_path / "replace", *sources, empty="skip", invalid_utf8="replace")
    assert texts(tmp_path / "replace") == ["a", "b\ufffd", "c\ufffd", "d\ufffde"]


def test_masks_follow_characters(tmp_path: Path) -> None:
    rows = [{"text": "aéb€", "spans": [[1, 2], [3, 4]]}, {"text": "xy", "spans": []}, {"text": "z", "spans": [[0, 1]]}]
    lines(tmp_path / "a.jsonl", *rows)
    make(tmp_path / "out", tmp_path / "a.jsonl", mask_column="spans")
    mask = Corpus.open(tmp_path / "out").mask
    assert mask is not None
    marks = [mask.read(d, 0, int(n)).tolist() for d, n in enumerate(mask.lengths)]
    assert marks == [[0, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1], [1, 1]]  # bytes of a, é, b, €; the end counts


@pytest.mark.parametrize("spans", ["x", 3, None, [1, 2], [[0, 9]], [[-1, 1]], [[1, 0]], [[0.5, 1]], [[True, 1]]])
def test_bad_spans_are_refused(tmp_path: Path, spans: Any) -> None:
    lines(tmp_path / "a.jsonl", {"text": "ab", "spans": spans})
    with pytest.raises(
        SourceError, match=r"line 1: 'spans' is .*, not a list of \[start, end\) ranges within its 2 char"
    ):
        make(tmp_path / "out", tmp_path / "a.jsonl", mask_column="spans")


def test_a_corpus_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "ab", "spans": [[0, 1]]})
    make(tmp_path / "out", tmp_path / "a.jsonl", mask_column="spans")
    with pytest.raises(PrepareError, match=r"out\.idx exists; take another --out, or --overwrite"):
        make(tmp_path / "out", tmp_path / "a.jsonl")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out.*")}
    write(tmp_path / "bad.jsonl", '{"text": "cd"}\n{')
    with pytest.raises(SourceError):
        make(tmp_path / "out", tmp_path / "bad.jsonl", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*out*")} == before
    make(tmp_path / "out", lines(tmp_path / "b.jsonl", {"text": "cd"}), overwrite=True)
    assert texts(tmp_path / "out") == ["cd"]
    assert Corpus.open(tmp_path / "out").mask is None  # the old one's mask has the same lengths


@pytest.mark.parametrize("size", [10, 1_000_000])  # fails when the file is closed; when it is written
@pytest.mark.parametrize("name", ["out", "o[1]t"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, size: int, name: str) -> None:
    source = write(tmp_path / "a.txt", "x" * size)
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / f".{name}.{os.getpid()}.partial.bin").symlink_to("/dev/full")
    with pytest.raises(PrepareError, match=r"no space left on .*made \(errno 28\): nothing was kept"):
        make(folder / name, source)
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "x")
    with pytest.raises(PrepareError, match=r"a\.txt/out cannot be written"):
        make(tmp_path / "a.txt" / "out", source)


def test_an_unreadable_file_is_blamed_itself(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.txt cannot be read: No such file"):
        list(Reader().read(tmp_path / "gone.txt"))


def test_a_document_that_an_index_cannot_count_is_refused(tmp_path: Path) -> None:
    from lsys.data.prepare import PrepareArgs, _Files
    from lsys.data.tokenizer import load_tokenizer

    with _Files(PrepareArgs([], tmp_path / "c"), load_tokenizer("bytes")) as files:
        with pytest.raises(PrepareError, match="a document of 2,147,483,648 tokens is longer than 2,147,483,647; cut"):
            files.add(np.broadcast_to(np.zeros(1, np.uint16), 1 << 31), None)  # takes no memory
    assert not [*tmp_path.iterdir()]


def test_numbers_are_called_as_megatron_calls_them() -> None:
    from lsys.config.corpora import HEAD, TYPES
    from lsys.runtime import install_megatron

    install_megatron()
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

    assert TYPES == {code.value: (code.name, np.dtype(code.name).itemsize) for code in DType}
    assert HEAD == len(_INDEX_HEADER) + 8 + 1 + 8 + 8
