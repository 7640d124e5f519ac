"""How a run is begun, as checkpoints hold it: wherever its folder is seen. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from lsys.checkpoint.manifest import Cursor
from lsys.config import Config

AUTO, NEVER, SCRATCH = "auto", "never", "scratch"
FOLDER = "checkpoints"  # in a run's folder


@dataclass(frozen=True)
class Start:
    """How a run is begun.

    Attributes:
        resume: `auto`, `never`, `scratch`, or the absolute path to resume from.
        weights: the absolute path to take weights from, or nothing.
        manifest: SHA-256 of that of the checkpoint it was begun with; "" where that is not known, or there was none.
    """

    resume: str
    weights: str = ""
    manifest: str = field(default="", compare=False)

    @classmethod
    def of(cls, settings: Config) -> Start:
        asked = settings.checkpoint
        resume = str(asked.resume.resolve()) if isinstance(asked.resume, Path) else asked.resume
        return cls(resume, str(asked.weights.resolve()) if asked.weights else "")

    @classmethod
    def done_before(cls, cursor: Cursor, run: Path) -> tuple[Start, ...]:
        """The starts that a checkpoint in a run's folder holds, oldest first; those of before hold the last one alone, or none."""
        trees = cursor.extra.get("start") or []
        return tuple(cls._of_tree(tree, run) for tree in (trees if isinstance(trees, list) else [trees]))

    @classmethod
    def _of_tree(cls, tree: dict[str, str], run: Path) -> Start:
        start = cls(_seen(tree["resume"], run), _seen(tree["weights"], run), tree["manifest"])
        if "from" in tree and not (start.path and Path(tree["from"]).resolve().is_relative_to(start.path)):
            return replace(start, manifest="")  # of before: that of the checkpoint that was loaded last
        return start

    def to_tree(self, run: Path) -> dict[str, str]:
        """For `Cursor.extra`. Paths in the run's folder are relative to it, since it may be moved or seen under another path."""
        return {"resume": _kept(self.resume, run), "weights": _kept(self.weights, run), "manifest": self.manifest}

    @property
    def path(self) -> Path | None:
        """To begin from."""
        text = self.weights or ("" if self.resume in (AUTO, NEVER, SCRATCH) else self.resume)
        return Path(text) if text else None

    @property
    def kind(self) -> tuple[str, bool]:
        """What it is but for the path: equal in starts that do the same with a checkpoint."""
        return "" if self.path and not self.weights else self.resume, bool(self.weights)

    @property
    def is_once(self) -> bool:
        """Whether it begins otherwise than from what is in the run's folder."""
        return bool(self.weights) or self.resume not in (AUTO, NEVER)

    def __str__(self) -> str:
        weights = f"checkpoint.weights {self.weights}" if self.weights else ""
        resume = f"checkpoint.resume {self.resume}" if self.resume != AUTO or not weights else ""
        return " and ".join(filter(None, (resume, weights)))


def _kept(text: str, run: Path) -> str:
    """A path as a checkpoint holds it; `./` tells a relative one from a word such as `auto`."""
    for folder in (run / FOLDER, run):
        if os.path.isabs(text) and is_within(Path(text), folder):
            inside = Path(text).resolve().relative_to(folder.resolve())
            return f"./{inside if folder == run else FOLDER / inside}"
    return text


def _seen(text: str, run: Path) -> str:
    """The absolute path that `_kept` or an earlier version kept."""
    return str((run / text).resolve()) if text.startswith(("./", "/")) else text


def is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
