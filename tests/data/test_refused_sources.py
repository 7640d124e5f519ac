"""Sources that are elsewhere, packed, or hold more than the corpus that is meant: refused, with what makes them do."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.texts import arrow, dataset, dataset_dict, lines, make, texts, write

from lsys.cli import main
from lsys.config.corpora import prepare_again, read_description
from lsys.data.prepare import PrepareArgs, PrepareError, prepare
from lsys.data.source_error import SourceError


def test_a_dataset_with_splits_wants_one_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = dataset_dict(tmp_path / "saved", train=["a", "b"], test=["held out"])
    with pytest.raises(
        SourceError, match=r"has the splits train, test, .*; name one with --split, such as --split train"
    ):
        make(tmp_path / "out", saved)
    with pytest.raises(SourceError, match=r"has the splits train, test, and none that is called dev"):
        make(tmp_path / "out", saved, split="dev")
    lines(tmp_path / "more.jsonl", {"text": "c"})
    counts = make(tmp_path / "out", saved, tmp_path / "more.jsonl", split="train")
    assert texts(tmp_path / "out") == ["a", "b", "c"]
    assert counts.sources == {str(saved): (2, 4), str(tmp_path / "more.jsonl"): (1, 2)}
    said = "".join(capsys.readouterr().out.split())
    assert f"{saved}:2documents,4tokens" in said and f"{tmp_path}/more.jsonl:1documents,2tokens" in said
    make(tmp_path / "one", dataset_dict(tmp_path / "single", train=["x"]))
    assert texts(tmp_path / "one") == ["x"]
    with pytest.raises(PrepareError, match="--split train: no source has splits"):
        make(tmp_path / "two", tmp_path / "more.jsonl", split="train")


def test_tables_that_are_called_by_splits_want_one_named(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "trainer"):
        lines(folder / "data" / f"{name}.jsonl", {"text": name})
    with pytest.raises(SourceError, match="has the splits test, train, .*--split train"):
        make(tmp_path / "out", folder)
    make(tmp_path / "out", folder, split="train")
    assert texts(tmp_path / "out") == ["train-00000-of-00002", "train-00001-of-00002"]
    (folder / "data" / "test-00000-of-00001.jsonl").unlink()
    make(tmp_path / "whole", folder)
    assert len(texts(tmp_path / "whole")) == 3


@pytest.mark.parametrize(
    "name", ["../../secret.arrow", "/etc/passwd", "..", "", 3, "notes", "secret.txt", "a/../../b.arrow"]
)
def test_names_in_a_dataset_stay_in_its_folder(tmp_path: Path, name: Any) -> None:
    """Files that the list must not reach are there, so that only the name can be at fault."""
    arrow(tmp_path / "secret.arrow", ["secret"])
    arrow(tmp_path / "b.arrow", ["secret"])
    saved = dataset(tmp_path / "sets" / "saved", ["a"])
    for each in ("notes", "secret.txt"):
        write(saved / each, "secret")
    (saved / "a").mkdir()
    write(saved / "state.json", json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(SourceError, match="which is not in its folder|which is no Arrow file"):
        make(tmp_path / "out", saved)
    write(tmp_path / "sets" / "dataset_dict.json", json.dumps({"splits": ["../sets", "saved"]}))
    with pytest.raises(SourceError, match=r"dataset_dict\.json names '\.\./sets', which is not in its folder"):
        make(tmp_path / "out", tmp_path / "sets")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b"\x1f\x8b", r"is compressed, and read unpacked; unpack it: gunzip -k .*a\.jsonl\.gz$"),
        ("a.json.zst", b"", r"unpack it: unzstd .*a\.json\.zst$"),
        ("a.json", b' [{"text": "a"}]', r"read as lines of JSON, .*jq -c '\.\[\]' .*a\.json > .*a\.jsonl$"),
        ("a.json", b'{"text": "a"}\n', r"read as lines of JSON, .*mv .*a\.json .*a\.jsonl$"),
        ("-", None, "standard input is not read; write it to a file"),
        ("s3://bucket/a", None, "is not on this machine; copy it here"),
        ("hf://datasets/org/name", None, r"nothing is downloaded; .*load_dataset\('org/name'\)\.save_to_disk"),
        ("org/name", None, r"nothing is downloaded; .*load_dataset\('org/name'\)\.save_to_disk"),
        ("texts/*.txt", None, "is a pattern that matches no file here, or is quoted; name files without quotes"),
    ],
)  # fmt: skip
def test_sources_that_are_elsewhere_or_packed_are_told(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    source = name if content is None else write(tmp_path / name, content)
    with pytest.raises(SourceError, match=message):
        make(tmp_path / "out", source)


def test_the_column_that_is_meant_is_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="it has content, n: name one with --text-column content"):
        make(tmp_path / "out", tmp_path / "a.parquet")
    lines(tmp_path / "a.jsonl", {"id": 3, "body": "x", "counts": [[0, 1]]})
    with pytest.raises(SourceError, match="there are id, body, counts: name one with --text-column body"):
        make(tmp_path / "out", tmp_path / "a.jsonl")
    with pytest.raises(SourceError, match="no key 'spans'; there are .*: name one with --mask-column"):
        make(tmp_path / "out", tmp_path / "a.jsonl", text_column="body", mask_column="spans")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_is_no_prefix(tmp_path: Path, is_there: bool) -> None:
    source = write(tmp_path / "a.txt", "x")
    if is_there:
        (tmp_path / "data").mkdir()
    with pytest.raises(PrepareError, match=r"data/? is a folder; name files in it, such as --out .*data/corpus$"):
        prepare(PrepareArgs(sources=[str(source)], out=f"{tmp_path}/data/", workers=1))
    if is_there:
        with pytest.raises(PrepareError, match="is a folder"):
            make(tmp_path / "data", source)
    make(tmp_path / "data" / "corpus", source)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["a.txt", "data"]


def test_the_command_that_makes_a_corpus_again_makes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines(Path("hub") / "train-0.jsonl", {"body": "a b"}, {"body": ""})
    lines(Path("hub") / "test-0.jsonl", {"body": "c"})
    make(Path("out"), "hub", split="train", text_column="body", empty="skip", suffix=[".x", ".y"])
    description, before = read_description("out"), Path("out.bin").read_bytes()
    Path("out.bin").write_bytes(b"damaged")
    said, _, command = prepare_again("out", description).partition(": lsys ")
    assert said == "prepare it again" and main(command.split()) == 0
    assert Path("out.bin").read_bytes() == before and read_description("out") == description


@pytest.mark.parametrize(
    "wrong", [{"sources": 3}, {"sources": [3]}, {"tokenizer": "bytes"}, {"options": [3]}, {"sources": None}]
)
def test_a_description_by_another_hand_makes_no_command(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write(tmp_path / "a.txt", "text")
    make(tmp_path / "out", tmp_path / "a.txt")
    assert "lsys data prepare" in prepare_again("out", description := read_description(f"{tmp_path}/out"))
    assert prepare_again("out", description | wrong) == "prepare it again"
