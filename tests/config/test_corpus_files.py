"""Corpora are held to their headers, descriptions, masks and each other, before torch is imported."""

import json
import os
import struct
from pathlib import Path

import pytest
from support.made import make

from lsys.config.messages import ConfigError
from lsys.config.rules import check_files, file_mistakes


def write_corpus(prefix: Path, lengths: list[int]) -> None:
    """Megatron's two files, byte by byte: documents of one sequence each, of numbers of two bytes."""
    count, starts = len(lengths), [2 * sum(lengths[:n]) for n in range(len(lengths))]
    numbers = struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *starts, *range(count + 1))
    Path(f"{prefix}.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1) + numbers)
    Path(f"{prefix}.bin").write_bytes(bytes(2 * sum(lengths)))


@pytest.mark.parametrize("ending", [".idx", ".bin"])
@pytest.mark.parametrize("change", [-7, 4])
def test_files_are_held_to_their_headers(tmp_path: Path, ending: str, change: int) -> None:
    """The command of the remedy is read from the description."""
    prefix = tmp_path / "corpus"
    write_corpus(prefix, [5, 4, 3])
    description = {"version": 1, "documents": 3, "tokens": 12, "sources": ["a b.txt"], "tokenizer": {"spec": "t.json"}}
    (tmp_path / "corpus.json").write_text(json.dumps(description))
    config = make(data__corpora=[{"path": str(prefix)}])
    assert file_mistakes(config) == []
    path = Path(f"{prefix}{ending}")
    size = path.stat().st_size
    os.truncate(path, size + change)
    (mistake,) = file_mistakes(config)
    assert f"{path} has {size + change} bytes, its {'header' if ending == '.idx' else 'index'} says {size}" in str(
        mistake
    )
    command = f"lsys data prepare 'a b.txt' --out {prefix} --overwrite --tokenizer t.json"
    assert mistake.is_local and str(mistake).endswith(f"; prepare it again: {command}")


def test_a_mask_and_a_description_of_another_corpus_are_told(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    write_corpus(prefix, [5, 4, 3])
    config = make(data__corpora=[{"path": str(prefix)}])
    write_corpus(tmp_path / "corpus.mask", [5, 4])
    assert "corpus.mask has other document lengths" in str(file_mistakes(config)[0])
    write_corpus(tmp_path / "corpus.mask", [5, 4, 3])
    (tmp_path / "corpus.json").write_text('{"version": 1, "documents": 3, "tokens": 11}')
    assert "says 3 documents and 11 tokens" in str(file_mistakes(config)[0])


def test_one_document_cannot_be_held_out(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [9])
    corpora = [{"path": str(tmp_path / "corpus")}]
    (mistake,) = file_mistakes(make(data__corpora=corpora, train__validate_tokens=10))
    assert mistake.key == "data.validation_fraction" and "has 1 document" in mistake.problem
    none = {"data__validation_fraction": 0}
    assert file_mistakes(make(data__corpora=corpora, train__validate_tokens=10, **none)) == []
    assert file_mistakes(make(data__corpora=corpora)) == []


def test_corpora_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    """Both are named, with the command that makes the second one of the first one's kind; what says nothing is let be."""
    known = {"a": ("x.json", "11112222aa", 5), "b": ("bytes", "bytes", 256), "c": ("x.json", "11112222aa", 6),
             "d": ("x.json", "33334444bb", 5), "e": ("x.json", "11112222aa", 5)}  # fmt: skip
    for name, (spec, fingerprint, eod) in known.items():
        write_corpus(tmp_path / name, [5, 4])
        tokenizer = {"spec": spec, "fingerprint": fingerprint, "eod_name": "<end>" if name == "a" else None}
        found_in = {
            "version": 1,
            "documents": 2,
            "tokens": 9,
            "sources": [f"{name}.txt"],
            "tokenizer": tokenizer,
            "eod": eod,
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(found_in))
    write_corpus(tmp_path / "none", [5, 4])

    def found(*names: str) -> list[str]:
        return [str(m) for m in file_mistakes(make(data__corpora=[{"path": str(tmp_path / name)} for name in names]))]

    assert found("a", "none", "e") == found("none", "b") == []
    command = (
        "lsys data prepare {0}.txt --out {1}/{0} --overwrite --tokenizer x.json --eod '<end>'; or leave one of them out"
    )
    for name, text in (
        ("b", "corpus {1}/{0} was made by tokenizer bytes, corpus {1}/a by x.json: a token would mean two things; "),
        ("c", "corpus {1}/{0} ends documents with token 6, corpus {1}/a with 5: a token would mean two things; "),
        (
            "d",
            "corpus {1}/{0} was made by tokenizer x.json (33334444), corpus {1}/a by x.json as it was then (11112222): ",
        ),
    ):
        (mistake,) = found("none", "a", "e", name)
        assert mistake.startswith(f"data.corpora.3.path: {text}".format(name, tmp_path))
        assert mistake.endswith("prepare it again: " + command.format(name, tmp_path))


def test_files(tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    config = make(data__corpora=[{"path": str(prefix)}])

    def found() -> list[str]:
        try:
            check_files(config)
        except ConfigError as error:
            return [str(m) for m in error.mistakes]
        return []

    assert len(found()) == 1
    assert f"{prefix}.bin and {prefix}.idx not found; lsys data prepare ... --out {prefix} makes them" in found()[0]
    write_corpus(prefix, [3, 2])
    assert found() == []
    sidecar = {"version": 1, "documents": 2, "tokens": 5, "vocab": 97}
    (tmp_path / "corpus.json").write_text(json.dumps(sidecar))
    assert found() == [f"model.vocab: 96 is below the 97 tokens of corpus {prefix}; 97 or more"]
    (tmp_path / "corpus.json").write_text("{")
    assert "is not what lsys data prepare writes" in found()[0]
    config = make(data__corpora=[{"path": f"{prefix}.bin"}])
    assert "leave out .bin: the path is a prefix" in found()[0]
