"""The first rank reads the corpora whole before process groups start; what it may leave out is left out."""

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support import parity
from support.texts import make, write

from lsys.data.corpus import Corpus, CorpusError
from lsys.train import corpora


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write(tmp_path / "a.txt", "some text " * 50)
    make(tmp_path / "c", tmp_path / "a.txt")
    return tmp_path / "c"


def settings(prefix: Path, verify: bool = True) -> Any:
    return parity.settings(data__corpora=[{"path": str(prefix)}], data__verify=verify, model__vocab=257)


def change(prefix: Path, token: int) -> None:
    raw = bytearray(Path(f"{prefix}.bin").read_bytes())
    raw[200:202] = token.to_bytes(2, "little")
    Path(f"{prefix}.bin").write_bytes(raw)


def test_a_flipped_byte_is_found_by_the_first_rank(prefix: Path) -> None:
    assert [corpus.documents for corpus in corpora.open_corpora(settings(prefix), is_first=True)] == [1]
    change(prefix, 1)  # a token like others
    with pytest.raises(CorpusError, match=r"c\.bin is not what was prepared .*; prepare it again: lsys data prepare"):
        corpora.open_corpora(settings(prefix), is_first=True)
    corpora.open_corpora(settings(prefix), is_first=False)
    corpora.open_corpora(settings(prefix, verify=False), is_first=True)


def test_long_corpora_are_not_hashed_but_their_ids_are_read(prefix: Path) -> None:
    with mock.patch.object(corpora, "HASHED", Path(f"{prefix}.bin").stat().st_size - 1):
        change(prefix, 1)
        corpora.open_corpora(settings(prefix), is_first=True)
        change(prefix, 300)
        with pytest.raises(CorpusError, match="token 100 of document 0 is 300, not below model.vocab 257"):
            corpora.open_corpora(settings(prefix), is_first=True)


def test_an_index_is_read_by_every_rank(prefix: Path) -> None:
    shutil.copy(f"{prefix}.idx", f"{prefix}.whole")
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    raw[-16] = 1  # the first document would begin at the second sequence
    Path(f"{prefix}.idx").write_bytes(raw)
    with pytest.raises(CorpusError, match="its documents do not cover its 1 sequences in order"):
        corpora.open_corpora(settings(prefix), is_first=False)
    shutil.copy(f"{prefix}.whole", f"{prefix}.idx")
    assert isinstance(corpora.open_corpora(settings(prefix), is_first=False)[0], Corpus)


def test_ranks_without_a_place_to_meet_are_refused() -> None:
    """Each of them would have been a run of its own."""
    from datetime import timedelta

    import torch

    from lsys.runtime.environment import Launch, LaunchError
    from lsys.runtime.groups import _start

    with pytest.raises(LaunchError, match="WORLD_SIZE is 2, and MASTER_ADDR or MASTER_PORT, .*; start with torchrun"):
        _start(Launch(rank=1, world_size=2), torch.device("cpu"), timedelta(seconds=1))
