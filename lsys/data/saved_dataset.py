"""Hugging Face datasets on disk, as `save_to_disk` writes them: one dataset, or a DatasetDict, a folder of them by split."""

import json
from pathlib import Path

from lsys.data.source_error import SourceError


def is_dataset(path: Path) -> bool:
    """Whether a folder is what Hugging Face's `save_to_disk` writes (one split, or a dictionary of them)."""
    return any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def dataset_splits(path: Path) -> list[str]:
    """The splits of a DatasetDict by its own list, which may name folders in it, and nothing else."""
    listing = path / "dataset_dict.json"
    try:
        names = [str(name) for name in json.loads(listing.read_text())["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise SourceError(f"{listing} does not list the dataset's splits; save the dataset again")
    for name in names:
        _require_plain(listing, name)
    return names


def _require_plain(listing: Path, name: object) -> None:
    """Refuse what is no name of a file or folder beside the list that names it: a dataset is another's, and may name any file of this machine."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise SourceError(
            f"{listing} names {name!r}, which is not in its folder; save the dataset again, or do not trust it"
        )


def dataset_files(path: Path) -> list[Path]:
    """The Arrow files that the dataset's own list names: beside them may lie caches, which repeat its rows."""
    found, state = [], path / "state.json"
    if state.is_file():
        try:
            names = [each["filename"] for each in json.loads(state.read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            raise SourceError(f"{state} does not list the dataset's files; save the dataset again") from None
        for name in names:
            _require_plain(state, name)
            if Path(name).suffix != ".arrow":
                raise SourceError(f"{state} names {name!r}, which is no Arrow file; save the dataset again")
        found = [path / name for name in names]
    if not found:
        found = sorted(p for p in path.glob("*.arrow") if not p.name.startswith("cache-"))
    missing = [each for each in found if not each.is_file()]
    if missing or not found:
        absent = f"{missing[0]} is missing" if missing else "it holds no Arrow file"
        raise SourceError(f"dataset {path} is not whole: {absent}; save it again with save_to_disk")
    return found
