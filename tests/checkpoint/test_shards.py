"""The distributed optimizer's states: written and read as the ranks hold them, whole to other readers, at the price of a rank's own part."""

import gc
import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support import resuming

NAME = "step-00000001"
BUFFERS = 16 << 20  # bytes that a save needs whatever the size
BIG: dict[str, Any] = {
    "model__hidden": 512,
    "model__layers": 4,
    "model__vocab": 512,
    "model__ffn": 1024,
    "model__pattern": "LS",
}


def cut(rank: int, world_size: int) -> list[tuple[Any, ...]]:
    """Of small tensors, the boxes of every range: (shape, start, stop, largest box, boxes)."""
    from lsys.checkpoint.shards import boxes

    return [
        (shape, start, stop, largest, [*boxes(shape, start, stop, largest)])
        for shape in [(), (1,), (7,), (3, 4), (2, 3, 4), (4, 1, 3), (2, 2, 2, 2)]
        for start in range(math.prod(shape) + 1)
        for stop in range(start, math.prod(shape) + 1)
        for largest in (1, 5, 100)
    ]


def test_boxes_are_the_numbers_of_a_range_in_order(gloo: Any) -> None:
    for shape, start, stop, largest, boxes in gloo(1, cut)[0]:
        whole = np.arange(math.prod(shape)).reshape(shape)
        parts = [whole[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in boxes]
        assert [n for part in parts for n in part.ravel()] == list(range(start, stop))
        row = whole.size // shape[0] if shape else 1
        assert all(0 < part.size <= max(largest, row) for part in parts)


def draw(engine: Any) -> None:
    """Moments that are known from the parameter: twice it, and its square."""
    from lsys.checkpoint.optimizer import allocate

    allocate(engine.optimizer)
    for each in engine.optimizer.chained_optimizers:
        for parameter, state in each.optimizer.state.items():
            state["exp_avg"].copy_(parameter.detach() * 2)
            state["exp_avg_sq"].copy_(parameter.detach() ** 2)
            state["step"] = torch.tensor(1.0)


def saves(rank: int, world_size: int, folder: Path, changes: dict[str, Any]) -> None:
    from lsys.checkpoint import Checkpoints

    with resuming.engine_of(rank, world_size, changes) as engine:
        draw(engine)
        Checkpoints(folder, 1).save(engine, resuming.cursor_of(engine, 1))


def read_by_torch(rank: int, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by torch's own reader and planner."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load

    reader = FileSystemReader(folder)
    entries: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    sizes = {key: value for key, value in entries.items() if hasattr(value, "size")}
    whole = {key: torch.full(value.size, math.nan, dtype=value.properties.dtype) for key, value in sizes.items()}
    load(whole, storage_reader=reader, planner=DefaultLoadPlanner())
    return whole


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (2, {}),
        (2, {"parallel__context": 2, "model__pattern": "MDGS"}),
        (4, {"parallel__tensor": 2}),
        (4, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    ],
)
def test_torch_reads_them_whole(gloo: Any, tmp_path: Path, ranks: int, changes: dict[str, Any]) -> None:
    """In fp32 the optimizer's parameter is the model's, which is stored beside it, whole; the moments are known from it."""
    gloo(ranks, saves, tmp_path, changes)
    (whole,) = gloo(1, read_by_torch, tmp_path / NAME)
    states = [key for key in whole if key.startswith("optimizer.state.param.")]
    models = [
        key for key in whole if not key.startswith("optimizer.state.") and f"optimizer.state.param.{key}" in states
    ]
    assert len(models) == len(states) > 20
    for key in models:
        assert torch.equal(whole[f"optimizer.state.param.{key}"], whole[key]), key
        assert torch.equal(whole[f"optimizer.state.exp_avg.{key}"], whole[key] * 2), key
        assert torch.equal(whole[f"optimizer.state.exp_avg_sq.{key}"], whole[key] ** 2), key


def price(rank: int, world_size: int, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What saving and loading cost this rank: memory beyond what there was, calls by size, bytes sent and read."""

    from lsys.checkpoint import Checkpoints, files
    from lsys.parallel.ledger import record

    found: dict[str, Any] = {"writes": [], "read": 0}

    class Counted:
        """A file whose writes are counted."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, block: memoryview) -> int:
            found["writes"].append(len(block))
            return self.file.write(block)

    stream, read = files.HashedStream.__init__, files._read

    def counting(self: Any, file: Any, beside: Any) -> None:
        stream(self, Counted(file), beside)

    def reading(file: int, place: int, into: torch.Tensor) -> None:
        found["read"] += into.nbytes
        read(file, place, into)

    with resuming.engine_of(rank, world_size, changes) as engine:
        draw(engine)
        held = [tensor for chunk in engine.chunks for tensor in chunk.module.state_dict().values()]
        states = [
            tensor
            for each in engine.optimizer.chained_optimizers
            for parameter, state in each.optimizer.state.items()
            for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
        ]
        found["model"], found["own"] = (sum(x.nbytes for x in tensors if x is not None) for tensors in (held, states))
        with mock.patch.object(files.HashedStream, "__init__", counting), mock.patch.object(files, "_read", reading):
            checkpoints = Checkpoints(folder, 1)
            checkpoints.save(
                engine, resuming.cursor_of(engine, 1)
            )  # what is imported for the first one is not of the shard's size
            found["writes"].clear()
            with record() as ledger:
                found["save memory"] = grown(lambda: checkpoints.save(engine, resuming.cursor_of(engine, 1)))
            found["load memory"] = grown(lambda: checkpoints.load(engine, folder / NAME))
        found["sent"] = ledger.bytes()
    return found


def grown(run: Any) -> int:
    """The most resident bytes beyond those before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    return next(
        int(line.split()[1]) << 10
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_pays_for_its_own_part(gloo: Any, tmp_path: Path, ranks: int) -> None:
    found = gloo(ranks, price, tmp_path, BIG)
    total = sum((tmp_path / NAME / f"__{rank}_0.distcp").stat().st_size for rank in range(ranks))
    for rank, each in enumerate(found):
        assert each["model"] > 25 << 20 and each["own"] < 1.02 * 3 * each["model"] / ranks
        assert all(each[name] < 0.1 * each["own"] + BUFFERS for name in ("save memory", "load memory"))
        assert each["sent"] < 1 << 20  # descriptions of tensors, none of their numbers
        assert each["read"] == each["model"] + each["own"]
        large = [n for n in each["writes"] if n >= 1 << 20]
        assert sum(large) > 0.95 * sum(each["writes"]) and len(each["writes"]) - len(large) <= 4
        size = (tmp_path / NAME / f"__{rank}_0.distcp").stat().st_size
        assert size == pytest.approx(total / ranks, rel=0.15)


def test_a_stream_writes_large_blocks_and_hashes_all_of_them(tmp_path: Path) -> None:
    import hashlib

    from lsys.checkpoint.files import Files
    from lsys.checkpoint.manifest import BLOCK

    rng, files, data = np.random.default_rng(0), Files(), b""
    sizes = [3, BLOCK - 4, 2, 5 * BLOCK + 7, 1, BLOCK, 2 * BLOCK, 0, 11]
    with files.create_stream(tmp_path / "file", "wb") as stream:
        for size in sizes:
            piece = rng.bytes(size)
            data += piece
            assert stream.write(piece) == size and stream.tell() == len(data)
    assert (tmp_path / "file").read_bytes() == data
    record = files.records["file"]
    assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_a_box_of_a_file_fills_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: torch.dtype) -> None:
    from lsys.checkpoint import files

    monkeypatch.setattr(files, "BLOCK", 64)  # bytes: so that boxes come in parts
    whole = torch.randn(5, 6, 7)
    (tmp_path / "file").write_bytes(b"head" + whole.numpy().tobytes())
    with open(tmp_path / "file", "rb") as file:
        for offset, size in [
            ((0, 0, 0), (5, 6, 7)),
            ((1, 0, 0), (2, 6, 7)),
            ((3, 2, 0), (1, 3, 7)),
            ((0, 1, 2), (5, 4, 3)),
            ((2, 2, 2), (0, 1, 1)),
        ]:
            box = tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))
            first = sum(a * b for a, b in zip(offset, whole.stride(), strict=True))
            target = torch.zeros(size, dtype=to)
            files.copy_box(target, file.fileno(), 4 + 4 * first, whole.dtype, whole.stride())
            assert torch.equal(target, whole[box].to(to))
        with pytest.raises(ValueError, match="a file ends at byte 844, before the 4 bytes"):
            files.copy_box(torch.zeros(1), file.fileno(), 4 + whole.nbytes, whole.dtype, (1,))


def test_each_file_is_one_ranks_to_verify_and_its_writers_where_there_are_as_many() -> None:
    from lsys.checkpoint import Cursor, Manifest
    from lsys.checkpoint.manifest import FileRecord

    names = [f"__{rank}_0.distcp" for rank in range(12)] + [".metadata", "common.pt", "metadata.json"]
    manifest = Manifest(Cursor(1, 1, ""), 1, 12, {}, {}, {name: FileRecord(1, "") for name in names})
    for world in (1, 2, 5, 12, 40):
        shares = [manifest.share(rank, world) for rank in range(world)]
        assert Counter(name for share in shares for name in share) == Counter(names)
    assert all(f"__{rank}_0.distcp" in manifest.share(rank, 12) for rank in range(12))


def test_what_is_in_a_file_has_to_be_what_is_asked_for(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
    from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

    from lsys.checkpoint import CheckpointError
    from lsys.checkpoint.files import Reader

    def read(saved: Any, offsets: tuple[int, ...], lengths: tuple[int, ...], target: torch.Tensor) -> torch.Tensor:
        with open(tmp_path / "file", "wb") as file:
            file.write(b"8 before")
            torch.save(saved, file)
        info = _StorageInfo("file", 8, (tmp_path / "file").stat().st_size - 8)
        index, sizes = MetadataIndex("w"), (torch.Size(offsets), torch.Size(lengths))
        item = ReadItem(LoadItemType.TENSOR, index, torch.Size([0] * len(lengths)), index, *sizes)
        with open(tmp_path / "file", "rb") as file:
            Reader(tmp_path, Metadata({}))._fill(target, file, info, item)
        return target

    whole = torch.arange(12.0).view(3, 4)
    assert torch.equal(read(whole, (1, 1), (2, 2), torch.zeros(2, 2)), whole[1:, 1:3])
    assert torch.equal(
        read(whole[1:], (0, 2), (2, 2), torch.zeros(2, 2)), whole[1:, 2:]
    )  # a view has a storage before it
    for saved in (whole.t(), {"w": whole}):
        with pytest.raises(CheckpointError, match="w in file is no contiguous tensor"):
            read(saved, (0, 0), (2, 2), torch.zeros(2, 2))
    for offsets, lengths, shape in (((2, 0), (2, 2), (2, 2)), ((0, 0), (2, 2), (2, 3)), ((-1, 0), (2, 2), (2, 2))):
        with pytest.raises(CheckpointError, match=r"w in file has shape \[3, 4\]"):
            read(whole, offsets, lengths, torch.zeros(shape))
