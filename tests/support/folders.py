"""Folders of checkpoints as the choice among them sees them: a manifest and files of a few bytes each."""

import random
import shutil
from pathlib import Path
from typing import Any

from support import parity

FILES = ("__0_0.distcp", "__1_0.distcp", "common.pt")
KINDS = ("flip", "truncate", "missing", "zeros", "append", "swap", "empty")


def settings(run: Path, *, resume: Any = "auto", weights: Any = None, **changes: Any) -> Any:
    """A configuration whose run's folder this is."""
    from lsys.config.schema import Checkpoint

    config = parity.settings(train__folder=run, **changes)
    return config.model_copy(update={"checkpoint": Checkpoint(resume=resume, weights=weights)})


def write(folder: Path, step: int, serial: int, config: Any = None, start: Any = None) -> Path:
    """A whole checkpoint; `start`: what it holds of how its run was begun."""
    import hashlib

    from lsys.checkpoint import Cursor, Manifest
    from lsys.checkpoint.manifest import FileRecord
    from lsys.config.load import dump

    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    records = {}
    for name in FILES:
        content = random.Random(f"{serial}/{name}").randbytes(400)
        (path / name).write_bytes(content)
        records[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    extra = {"start": start} if start is not None else {}
    cursor = Cursor(step, step, dump(config or parity.settings()), extra)
    Manifest(cursor, serial, 2, {}, {}, records).write(path)
    return path


def damage(folder: Path, name: str, kind: str, rng: random.Random, older: Path) -> None:
    """Change one file of a checkpoint, really; `swap` puts that of an older one in its place."""
    path = folder / name
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[at:]
    elif kind == "zeros":
        data[at : at + 50] = bytes(len(data[at : at + 50]))
    elif kind == "append":
        data += b"x"
    elif kind == "empty":
        data.clear()
    elif kind == "swap":
        shutil.copy(older / name, path)
        return
    path.write_bytes(data)
    if kind == "missing":
        path.unlink()
