"""Sources of text as users have them, made and turned into corpora."""

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc

from lsys.data.corpus import Corpus
from lsys.data.prepare import Counts, PrepareArgs, prepare

EOD = 256


def make(out: Path, *sources: object, workers: int = 1, **options: Any) -> Counts:
    return prepare(PrepareArgs(sources=[str(s) for s in sources], out=out, workers=workers, **options))


def texts(prefix: Path) -> list[str]:
    """The documents of a byte corpus; each must end with its end-of-document token, which occurs nowhere else."""
    corpus, found = Corpus.open(prefix), []
    for document, length in enumerate(corpus.lengths.tolist()):
        ids = corpus.read(document, 0, length)
        assert ids[-1] == EOD and (ids[:-1] < EOD).all()
        found.append(bytes(ids[:-1].tolist()).decode())
    return found


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, *rows: object) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def dataset(folder: Path, *parts: list[str]) -> Path:
    """What Hugging Face's `save_to_disk` writes: Arrow streams and a state.json that lists them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        arrow(folder / name, part)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names]}))
    write(folder / "dataset_info.json", "{}")
    return folder


def arrow(path: Path, part: list[str]) -> None:
    table = pyarrow.table({"text": part})
    with pyarrow.OSFile(str(path), "wb") as file, ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def dataset_dict(folder: Path, **splits: list[str]) -> Path:
    """What it writes of a dataset with splits."""
    for name, rows in splits.items():
        dataset(folder / name, rows)
    write(folder / "dataset_dict.json", json.dumps({"splits": list(splits)}))
    return folder
