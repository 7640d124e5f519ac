"""No pickle of a checkpoint runs anything, even if the manifest vouches for it."""

import dataclasses
import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support import resuming

from lsys.checkpoint import Checkpoints, Manifest
from lsys.checkpoint.manifest import FileRecord
from lsys.checkpoint.unpickle import load_restricted

NAME = "step-00000001"


class Planted:
    """Creates a file when unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


def saves(rank: int, world_size: int, folder: Path) -> None:
    with resuming.engine_of(rank, world_size, {}) as engine:
        resuming.advance(engine, 0, 1, resuming.Seen())
        Checkpoints(folder, 1).save(engine, resuming.cursor_of(engine, 1))


def loads(rank: int, world_size: int, folder: Path) -> str:
    with resuming.engine_of(rank, world_size, {}) as engine:
        try:
            Checkpoints(folder, 1).load(engine, folder / NAME)
        except ValueError as error:
            return str(error)
    return "loaded"


def vouch(folder: Path) -> None:
    """Make the manifest match the files."""
    manifest = Manifest.read(folder)
    records = {name: (folder / name).read_bytes() for name in manifest.files}
    files = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in records.items()}
    dataclasses.replace(manifest, files=files).write(folder)


def torch_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def plant_in_metadata(folder: Path, planted: Planted) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(planted))


def plant_beside_metadata(folder: Path, planted: Planted) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = planted
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_common(folder: Path, planted: Planted) -> None:
    (folder / "common.pt").write_bytes(torch_bytes({"scheduler": planted}))


def plant_in_object(folder: Path, planted: Planted) -> None:
    """In the random-number state, which is a pickle inside a file of tensors; found through .metadata, which is harmless."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (index,) = [index for index in metadata.storage_data if index.fqn.startswith("random")]
    info, data = metadata.storage_data[index], torch_bytes([planted])
    with open(folder / info.relative_path, "ab") as file:
        metadata.storage_data[index] = dataclasses.replace(info, offset=file.tell(), length=len(data))
        file.write(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_in_tensor(folder: Path, planted: Planted) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith("decoder"))
    info, data = metadata.storage_data[index], torch_bytes(planted)
    with open(folder / info.relative_path, "ab") as file:
        metadata.storage_data[index] = dataclasses.replace(info, offset=file.tell(), length=len(data))
        file.write(data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


PLACES = [plant_in_metadata, plant_beside_metadata, plant_in_common, plant_in_object, plant_in_tensor]


@pytest.mark.parametrize("plant", PLACES)
def test_planted_command_is_refused_and_not_run(gloo: Any, tmp_path: Path, plant: Any) -> None:
    gloo(1, saves, tmp_path)
    witness = tmp_path / "ran"
    plant(tmp_path / NAME, Planted(witness))
    vouch(tmp_path / NAME)
    (text,) = gloo(1, loads, tmp_path)
    assert not witness.exists()
    assert "system" in text and ("refused" in text or plant is plant_in_tensor), text


def test_planted_command_would_run(tmp_path: Path) -> None:
    """The tests above can fail."""
    pickle.loads(pickle.dumps(Planted(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_files_outside_are_refused(gloo: Any, tmp_path: Path) -> None:
    gloo(1, saves, tmp_path)
    metadata = pickle.loads((tmp_path / NAME / ".metadata").read_bytes())
    index = next(iter(metadata.storage_data))
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], relative_path="../elsewhere")
    (tmp_path / NAME / ".metadata").write_bytes(pickle.dumps(metadata))
    vouch(tmp_path / NAME)
    (text,) = gloo(1, loads, tmp_path)
    assert "../elsewhere is not listed in the manifest" in text


@pytest.mark.parametrize("value", [print, eval, os.system, torch.load, torch.hub.load, pickle.loads, getattr])
def test_functions_cannot_be_named(value: Any) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
        load_restricted(pickle.dumps(value))


def test_dtypes_and_sizes_can() -> None:
    value = {"dtype": torch.bfloat16, "size": torch.Size([2, 3])}
    assert load_restricted(pickle.dumps(value)) == value
