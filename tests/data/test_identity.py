"""What the data of a checkpoint is, against what it is now: whatever moves a token or changes what counts is a difference, another place is none."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import parity
from support.corpora import write_corpus

from lsys.config.load import dump
from lsys.data.corpus import Corpus, sha256
from lsys.data.identity import differences, identity, identity_of_config
from lsys.runtime import install_megatron

install_megatron()

DOCUMENTS = [[*range(n, n + 60)] for n in range(0, 600, 60)]
RESTART = "or data.restart: true, which begins the new data at its first token while steps and weights go on"


def make(folder: Path, names: str = "ab", weights: tuple[float, ...] = (1, 2), **changes: Any) -> Any:
    corpora = [{"path": str(folder / name), "weight": w} for name, w in zip(names, weights, strict=True)]
    return parity.settings(data__corpora=corpora, **changes)


def now(settings: Any) -> dict[str, Any]:
    """As a manifest holds it."""
    found = identity(settings, [Corpus.open(str(corpus.path)) for corpus in settings.data.corpora])
    return json.loads(json.dumps(found, sort_keys=True))


def describe(prefix: Path) -> None:
    """The sidecar of what is there."""
    documents, tokens = len(Corpus.open(prefix).lengths), int(Corpus.open(prefix).lengths.sum())
    hashes = {ending: sha256(Path(f"{prefix}{ending}")) for ending in (".bin", ".idx")}
    text = json.dumps({"version": 1, "documents": documents, "tokens": tokens, "sha256": hashes})
    Path(f"{prefix}.json").write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    write_corpus(tmp_path / "one" / "a", DOCUMENTS)
    write_corpus(tmp_path / "one" / "b", DOCUMENTS[:4])
    return tmp_path / "one"


def flip(folder: Path, name: str, place: int) -> None:
    raw = bytearray((folder / name).read_bytes())
    raw[place] ^= 1
    (folder / name).write_bytes(raw)


def marks(folder: Path, mark: int = 1) -> None:
    write_corpus(folder / "a.mask", [[mark] * len(document) for document in DOCUMENTS])


def exchange(folder: Path) -> None:
    """Documents of other lengths with the same tokens in all."""
    write_corpus(folder / "a", [DOCUMENTS[0][:50], [*DOCUMENTS[0][50:], *DOCUMENTS[1]], *DOCUMENTS[2:]])


Case = tuple[Callable[[Path], object], dict[str, Any], str, str]
CASES: dict[str, Case] = {
    "seed": (lambda f: None, {"data__seed": 1}, "data.seed", "1, and 0 in step-4"),
    "fraction": (
        lambda f: None, {"data__validation_fraction": 0.2}, "data.validation_fraction", "0.2, and 0.01 in step-4"
    ),
    "weight": (lambda f: None, {"weights": (2, 2)}, "data.corpora.0.weight", "0.5 of the tokens are of"),
    "order": (lambda f: None, {"names": "ba", "weights": (2, 1)}, "data.corpora", "in the order"),
    "one less": (lambda f: None, {"names": "a", "weights": (1,)}, "data.corpora", "1 corpora"),
    "another corpus": (
        lambda f: write_corpus(f / "c", DOCUMENTS[1:]), {"names": "cb"}, "data.corpora.0.path", "holds other tokens or documents"
    ),
    "first byte": (lambda f: flip(f, "a.bin", 0), {}, "data.corpora.0.path", "holds other tokens or documents"),
    "last byte": (lambda f: flip(f, "b.bin", -1), {}, "data.corpora.1.path", "holds other tokens or documents"),
    "lengths": (exchange, {}, "data.corpora.0.path", "holds other tokens or documents"),
    "mask": (marks, {}, "data.corpora.0.path", "has a loss mask, and had none in step-4; take it away"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whatever_moves_a_token_is_a_difference(folder: Path, case: str) -> None:
    change, changes, key, text = CASES[case]
    was = now(make(folder))
    change(folder)
    found, unknown = differences(was, now(make(folder, **changes)), "step-4")
    assert found[0].key == key and text in str(found[0]) and str(found[0]).endswith(RESTART) and not unknown
    assert len(found) == (2 if case == "weight" else 1)  # one share less is another one more


def test_masks_are_told_apart(folder: Path) -> None:
    none = now(make(folder))
    marks(folder)
    ones = now(make(folder))
    marks(folder, 0)
    zeros = now(make(folder))
    assert "has no loss mask, and had one in x; put that one back" in str(differences(ones, none, "x")[0][0])
    assert "the loss mask of" in str(differences(ones, zeros, "x")[0][0])
    assert differences(zeros, zeros, "x") == ([], [])


@pytest.mark.parametrize("described", [False, True])
def test_another_place_is_no_difference(folder: Path, described: bool) -> None:
    if described:
        describe(folder / "a")
    was = now(make(folder))
    moved = Path(shutil.move(folder, folder.parent / "two"))
    assert differences(was, now(make(moved)), "x") == ([], [])
    assert differences(was, now(make(moved, weights=(2, 4))), "x") == ([], [])  # the same shares
    (moved / "a.json").unlink(missing_ok=True)  # a description that is gone, or made
    assert differences(was, now(make(moved)), "x") == ([], [])
    describe(moved / "b")
    assert differences(was, now(make(moved)), "x") == ([], [])


def test_a_description_sees_what_a_sample_does_not(tmp_path: Path) -> None:
    """One bit of 4 MB, between the samples; the corpus was prepared anew."""
    found: dict[str, Any] = {}
    for bit in (0, 1):
        write_corpus(tmp_path / "a", [[bit if n == 5000 else 7 for n in range(1 << 21)]])
        describe(tmp_path / "a")
        was, found = found, now(make(tmp_path, "a", (1,)))
    assert was["corpora"][0]["files"][".bin"]["sample"] == found["corpora"][0]["files"][".bin"]["sample"]
    assert len(differences(was, found, "x")[0]) == 1


def test_a_checkpoint_of_before_tells_what_its_configuration_has(folder: Path) -> None:
    was = identity_of_config(dump(make(folder)))
    found, unknown = differences(was, now(make(folder)), "x")
    assert not found and unknown == [str(folder / "a"), str(folder / "b")]
    assert [m.key for m in differences(was, now(make(folder, data__seed=1)), "x")[0]] == ["data.seed"]
    assert [m.key for m in differences(was, now(make(folder, "ba", (2, 1))), "x")[0]] == ["data.corpora"]
    moved = Path(shutil.move(folder, folder.parent / "two"))
    found, _ = differences(was, now(make(moved)), "x")
    assert [m.key for m in found] == ["data.corpora.0.path", "data.corpora.1.path"]
    assert f"if it is the same corpus, link {folder / 'a'}.bin to it" in str(found[0])
    folder.mkdir()
    for name in "ab":  # the remedy
        os.symlink(moved / f"{name}.bin", folder / f"{name}.bin")
    assert differences(was, now(make(moved)), "x")[0] == []


def test_a_sample_is_spread_evenly_from_the_first_byte_to_the_last(tmp_path: Path) -> None:
    """64 pieces of 4 KiB."""
    from lsys.data.corpus import _sample

    path, size = tmp_path / "a.bin", 3 << 20
    path.write_bytes(bytes(size))
    plain = _sample(path)
    for n in range(64):
        begin = (size - 4096) * n // 63
        for place, is_seen in ((begin, True), (begin + 4095, True), (begin + 4096, False)):
            with path.open("r+b") as file:
                file.seek(place)
                if place < size:
                    file.write(b"\1")
            assert (_sample(path) != plain) is (is_seen and place < size), (n, place)
            path.write_bytes(bytes(size))
