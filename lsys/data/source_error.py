"""Why a source of text cannot be read, and what makes it one that can."""

import re
from collections.abc import Sequence
from pathlib import Path

UNPACK = {
    ".gz": "gunzip -k",
    ".zst": "unzstd",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".lz4": "unlz4",
    ".zip": "unzip",
}


class SourceError(ValueError):
    """Text cannot be read as asked."""


def unreadable(path: Path, known: Sequence[str]) -> str:
    """Why a file of this ending is not read, and what makes it one that is."""
    if path.suffix in UNPACK:
        return f"{path} is compressed, and read unpacked; unpack it: {UNPACK[path.suffix]} {path}"
    if path.suffix in (".json", ".ndjson"):
        with path.open("rb") as file:
            is_list = file.read(256).lstrip()[:1] == b"["
        lines = path.with_suffix(".jsonl")
        how = f"one object a line makes it: jq -c '.[]' {path} > {lines}" if is_list else f"if it is: mv {path} {lines}"
        return f"{path} is JSON, and read as lines of JSON, .jsonl; {how}"
    return (
        f"{path} ends in {path.suffix}, which is none of {', '.join(dict.fromkeys(known))}; "
        f"--suffix {path.suffix} reads it as one document of text"
    )


def absent(source: str) -> str:
    """Why a source is not there, and where it may be had from."""
    if source == "-":
        return "standard input is not read; write it to a file, and name that"
    if re.match(r"[a-z0-9]+://", source) and not source.startswith("hf://"):
        return f"{source} is not on this machine; copy it here, and name the file or folder"
    if re.search(r"[*?\[]", source):
        return f"{source} is a pattern that matches no file here, or is quoted; name files without quotes, or a folder"
    name = source.removeprefix("hf://").removeprefix("datasets/")
    if source.startswith("hf://") or re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).parent.exists():
        how = f"datasets.load_dataset({name!r}).save_to_disk(FOLDER)"
        return f"source {source} does not exist, and nothing is downloaded; name a file, a folder or stdlib: {how} makes one of a dataset of that name"
    return f"source {source} does not exist; name a file, a folder, or stdlib"
