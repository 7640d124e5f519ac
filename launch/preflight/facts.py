"""What a node finds out about itself, without torch: versions, code, GPUs, limits, its configuration and files."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsys.launch.preflight.report import Report

if TYPE_CHECKING:
    from lsys.config.schema import Config

PACKAGES = ("torch", "megatron-core", "triton", "numpy", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "transformer-engine")
TREES = ("lsys", "lsys.kernels", "lsys.parallel", "lsys.launch")


def gather(report: Report, config: str, words: Sequence[str]) -> "Config | None":
    """The configuration, if there is one that can be read; fills in what needs no other node."""
    report.versions = versions()
    report.code = code_digest()
    report.gpus, report.driver = gpus()
    report.shm = free_bytes("/dev/shm")
    report.descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _configuration(report, config, words) if config else None


def versions() -> dict[str, str]:
    """Version by package, of those that are installed; python and what CUDA torch was built for."""
    found = {"python": platform.python_version()}
    for name in ("lsys", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = importlib.util.find_spec("torch")  # its version file is read, as importing it takes seconds
    if torch and torch.origin:
        text = (Path(torch.origin).parent / "version.py").read_text()
        if built := re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE):
            found["CUDA"] = built[1]
    return found


def code_digest() -> str:
    """Digest of lsys's own source: installations from a checkout change without their version."""
    digest = hashlib.sha256()
    for tree in TREES:
        spec = importlib.util.find_spec(tree)
        for root in map(Path, spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{tree}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def gpus() -> tuple[list[str], str]:
    """Name and memory of each GPU that CUDA shows to the ranks, and the driver's version; none without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return [], ""
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 4]
    return _visible(rows), rows[0][4] if rows else ""


def _visible(rows: Sequence[Sequence[str]]) -> list[str]:
    """Name and memory of the rows that CUDA_VISIBLE_DEVICES leaves; like CUDA, up to the first entry without a device."""
    named = [f"{name} {memory}" for _, _, name, memory, _ in rows]
    entries = os.environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        return named
    found = []
    for entry in map(str.strip, entries.split(",")):
        if entry.startswith("MIG-") and rows:
            found.append(f"{rows[0][2]} MIG")  # which GPU it is a part of, its name does not say
            continue
        # An index, or the beginning of a UUID.
        each = [
            n for n, row in enumerate(rows) if entry == row[0] or (entry[:4] == "GPU-" and row[1].startswith(entry))
        ]
        if not each:
            break
        found.append(named[each[0]])
    return found


def free_bytes(path: str) -> int:
    """Free for a user at a path, or at the nearest folder above that exists."""
    for place in (Path(path), *Path(path).absolute().parents):
        try:
            there = os.statvfs(place)
        except OSError:
            continue
        return there.f_bavail * there.f_frsize
    return 0


def host_name() -> str:
    return socket.gethostname().split(".")[0]


def _configuration(report: Report, config: str, words: Sequence[str]) -> "Config | None":
    """The configuration as this node reads it, and the files that it names."""
    from lsys.config.load import load, resolved
    from lsys.config.messages import ConfigError
    from lsys.config.modules import missing_modules
    from lsys.config.overrides import parse_overrides
    from lsys.config.rules import check, file_mistakes
    from lsys.predict.checkpoint import checkpoint_bytes

    try:
        settings = load(config, parse_overrides(words))
    except ConfigError as error:
        report.mistakes = [str(mistake) for mistake in error.mistakes]
        return None
    mistakes = check(settings, report.nodes * report.ranks) + missing_modules(settings)
    mistakes += file_mistakes(settings, absent=False)  # `files` says what corpora are missing
    report.mistakes = [str(mistake) for mistake in mistakes]
    report.config = flat(resolved(settings))
    report.folder = str(settings.train.folder)
    if settings.checkpoint.save:
        report.checkpoint = checkpoint_bytes(settings)
    for corpus in settings.data.corpora:
        for ending in (".bin", ".idx"):
            path = Path(f"{corpus.path}{ending}")
            report.files[str(path)] = path.stat().st_size if path.is_file() else -1
    return settings


def flat(tree: Any, above: str = "") -> dict[str, Any]:
    """Values by dotted key, as in `data.corpora.0.path`."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {above: tree}
    return {
        key: value for name, part in items for key, value in flat(part, f"{above}.{name}" if above else name).items()
    }


def look_at_folder(report: Report, marker: str) -> None:
    """Free space of train.folder, checkpoints there, and whether the host's marker is there.

    Nobody looks into the folder before the host has written: a network file system remembers what was missing.
    """
    if not report.folder:
        return
    folder = Path(report.folder)
    report.marker = not marker or (folder / marker).is_file()
    report.free = free_bytes(report.folder)
    checkpoints = folder / "checkpoints"
    report.kept = sum(path.is_dir() for path in checkpoints.iterdir()) if checkpoints.is_dir() else 0
    if not os.access(folder, os.W_OK | os.X_OK):
        report.error = "not writable" if folder.is_dir() else "no such folder"


def look_at_checkpoints(report: Report, settings: "Config | None") -> None:
    """Adds what is wrong with how the run is to begin; of train.folder too, so only behind `look_at_folder`."""
    if settings is not None:
        from lsys.checkpoint import choice

        report.mistakes += [str(mistake) for mistake in choice.mistakes(settings)]
