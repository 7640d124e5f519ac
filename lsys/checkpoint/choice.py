"""Which checkpoint a run begins with, by what its configuration asks for and what is in its folder. Needs no torch.

`checkpoint.resume` and `checkpoint.weights` say how a run is begun. What begins it otherwise than from its own newest checkpoint is done
once in a run's life: each checkpoint holds the starts done till then (`starts.Start`, in `Cursor.extra`), and where the newest of `train.folder`
has this one among them, the run goes on from that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from lsys.checkpoint.compatible import differences
from lsys.checkpoint.manifest import NAME, CheckpointError, Manifest, UnreadableError, digest
from lsys.checkpoint.starts import AUTO, FOLDER, NEVER, SCRATCH, Start, is_within
from lsys.config import Config
from lsys.config.messages import Mistake

NAMES = re.compile(r"(step-\d{8,})(\.partial|\.replaced|\.deleted|\.damaged(-\d+)?)?")
OTHER = "take the checkpoint's values, or start in a new train.folder"


@dataclass(frozen=True)
class Found:
    """What is in a folder of checkpoints.

    Attributes:
        whole: by their sizes, oldest first; the newest was written last, whatever its step.
        damaged: checkpoints that are not whole, and why, or the name that says so.
        unreadable: checkpoints of another format, or of another user's.
        leftovers: what an interrupted save or deletion left, and why it is none.
    """

    whole: dict[Path, Manifest] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)
    unreadable: dict[Path, str] = field(default_factory=dict)
    leftovers: dict[Path, str] = field(default_factory=dict)

    @property
    def passed_over(self) -> dict[Path, str]:
        return self.damaged | self.unreadable | self.leftovers

    @property
    def is_empty(self) -> bool:
        """Whether no checkpoint was ever there."""
        return not (self.whole or self.damaged or self.unreadable)


def look(folder: Path) -> Found:
    """What is in a folder; sizes are compared, contents are not. Raises UnreadableError where the folder cannot be read."""
    found, whole = Found(), dict[Path, Manifest]()
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise UnreadableError(f"{folder} cannot be read: {error.strerror}; let this user read it") from None
    for name in names:
        if not (match := NAMES.fullmatch(name)):
            continue
        path = folder / name
        ending = match[2] or ""
        if ending in (".partial", ".deleted"):
            found.leftovers[path] = "its writing was interrupted" if ending == ".partial" else "it was being deleted"
        elif ending.startswith(".damaged"):
            found.damaged[path] = "it was found damaged before"
        elif ending == ".replaced" and path.with_suffix("") in whole:
            found.leftovers[path] = "it was written anew"
        else:
            _sort_in(path, match[1], whole, found)
    found.whole.update(sorted(whole.items(), key=lambda item: item[1].serial))
    return found


def _sort_in(path: Path, name: str, whole: dict[Path, Manifest], found: Found) -> None:
    try:
        manifest = Manifest.read(path)
        reason = manifest.incomplete(path)
    except UnreadableError as error:
        found.unreadable[path] = str(error)
        return
    except CheckpointError as error:
        found.damaged[path] = str(error)
        return
    if name != f"step-{manifest.cursor.step:08d}":
        reason = f"its {NAME} is that of step {manifest.cursor.step}"
    if reason:
        found.damaged[path] = reason
    else:
        whole[path] = manifest


class Source(NamedTuple):
    """A checkpoint, and whether it was named itself, not the folder of a run whose newest it is."""

    path: Path
    is_named: bool


def find_checkpoint(path: Path, passed: Container[Path] = ()) -> Source:
    """The checkpoint that a path means: itself, or the newest whole one of a run's folder or of its folder `checkpoints`.

    Args:
        passed: that are not to be taken.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a checkpoint's folder, or a run's")
    if (path / NAME).exists():
        return Source(path, True)
    damaged: dict[Path, str] = {}
    for folder in (path, path / FOLDER):
        found = look(folder)
        if whole := [each for each in found.whole if each not in passed]:
            return Source(whole[-1], False)
        damaged |= found.damaged | found.unreadable | {each: "it is damaged" for each in found.whole}
    reasons = "".join(f"; {each.name}: {reason}" for each, reason in damaged.items())
    raise CheckpointError(
        f"{path} is no checkpoint, and no run's folder with a whole one; give train.folder, or a step-* folder in it{reasons}"
    )


@dataclass(frozen=True)
class Plan:
    """What a run begins with.

    Attributes:
        checkpoint: that is loaded, or None: the seed's weights.
        weights: whether only its weights are taken.
        is_own: whether it is among the run's own checkpoints, so that a damaged one is renamed.
        is_named: whether the configuration names this very checkpoint, so that no other does.
        aside: whether what is in the run's folder is set aside.
        done: the starts done in the run's life before.
    """

    checkpoint: Path | None = None
    weights: bool = False
    is_own: bool = False
    is_named: bool = False
    aside: bool = False
    done: tuple[Start, ...] = field(default=(), compare=False)

    @property
    def goes_on(self) -> bool:
        """Whether with the newest of the run's own checkpoints."""
        return self.is_own and not self.is_named


def plan(settings: Config, passed: Container[Path] = ()) -> Plan:
    """What a run with these settings begins with, as this process sees its folder now.

    Args:
        passed: checkpoints of other folders that turned out to be damaged.

    Raises:
        CheckpointError: it cannot begin: value, rule and remedy.
    """
    start, own = Start.of(settings), settings.train.folder / FOLDER
    found = look(own)
    newest = next(reversed(found.whole), None)
    done = Start.done_before(found.whole[newest].cursor, settings.train.folder) if newest else ()
    if start.resume == NEVER:
        if not found.is_empty:
            there = next(iter([*reversed(found.whole), *found.damaged, *found.unreadable]))
            raise CheckpointError(
                f"{there} exists and checkpoint.resume is never: take another train.folder, or checkpoint.resume auto to go on from it"
            )
        return _elsewhere(settings, passed)
    if is_own(start, settings) or _is_among(start, done):
        if newest and not found.unreadable:
            return Plan(newest, is_own=True, done=done)
        if not found.is_empty or start.resume != AUTO:
            raise CheckpointError(_ruined(own, found, start))
        return Plan()
    if start.resume == SCRATCH:
        return _from_scratch(settings, found, start, passed)
    if (inside := settings.checkpoint.resume) and isinstance(inside, Path) and is_within(inside, own):
        return Plan(find_checkpoint(inside).path, is_own=True, is_named=True, done=done)
    if found.is_empty:
        return _elsewhere(settings, passed)
    if not newest:
        raise CheckpointError(_ruined(own, found, start))
    raise CheckpointError(
        f"{start} starts a run, and train.folder {settings.train.folder} has the checkpoints of another one, the newest {newest.name}: take "
        f"another train.folder, or checkpoint.resume auto without checkpoint.weights to go on from {newest.name}, or move {own} away"
    )


def record(settings: Config, begun: Plan, manifest: str) -> list[dict[str, str]]:
    """For `Cursor.extra["start"]`: the starts done in the run's life, with this one where it is done now.

    Args:
        manifest: SHA-256 of that of the checkpoint that the run begins with.
    """
    start, done = replace(Start.of(settings), manifest=manifest), [each for each in begun.done if each.is_once]
    is_now = start.is_once and not begun.goes_on
    return [each.to_tree(settings.train.folder) for each in (*done, *([start] if is_now else []))]


def is_own(start: Start, settings: Config) -> bool:
    """Whether the newest of the run's own checkpoints is asked for."""
    folder = settings.train.folder.resolve()
    return not start.weights and start.resume in (AUTO, str(folder), str(folder / FOLDER))


def _is_among(start: Start, done: Sequence[Start]) -> bool:
    """Whether a start was done: one with the same paths, or with the same checkpoint under another path."""
    known = {each.manifest for each in done if each.manifest and each.kind == start.kind}
    if start in done or not (start.path and known):
        return start in done
    try:
        return digest(find_checkpoint(start.path).path) in known
    except (CheckpointError, OSError):
        return False


def _elsewhere(settings: Config, passed: Container[Path]) -> Plan:
    """From a checkpoint of another folder, or from none."""
    asked = settings.checkpoint
    path = asked.weights or (asked.resume if isinstance(asked.resume, Path) else None)
    if path is None:
        return Plan()
    source = find_checkpoint(path, passed)
    return Plan(source.path, weights=asked.weights is not None, is_named=source.is_named)


def _from_scratch(settings: Config, found: Found, start: Start, passed: Container[Path]) -> Plan:
    own, weights = settings.train.folder / FOLDER, settings.checkpoint.weights
    if (
        not found.is_empty
        and not found.whole
        and any(_is_among(start, _done_before(path, settings.train.folder)) for path in found.damaged)
    ):
        raise CheckpointError(_ruined(own, found, start))
    if weights and is_within(weights, settings.train.folder):
        raise CheckpointError(
            f"{weights} is in train.folder {settings.train.folder}, which checkpoint.resume scratch sets aside; take another train.folder"
        )
    begun = _elsewhere(settings, passed)
    return Plan(begun.checkpoint, begun.weights, begun.is_own, begun.is_named, aside=True)


def _done_before(path: Path, run: Path) -> tuple[Start, ...]:
    """The starts that a damaged checkpoint holds, where its manifest is whole."""
    try:
        return Start.done_before(Manifest.read(path).cursor, run)
    except CheckpointError:
        return ()


def _ruined(own: Path, found: Found, start: Start) -> str:
    """That checkpoints were there and none can be used."""
    if found.is_empty:
        return f"{start} names the run's own folder, and {own} has no checkpoint; checkpoint.resume auto starts a run there"
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in (found.damaged | found.unreadable).items())
    if found.unreadable:
        return f"{own} has checkpoints that cannot be read: {reasons}. Move what is not needed away from there"
    begin = (
        "move that folder away"
        if start.resume == SCRATCH
        else "checkpoint.resume scratch sets them aside and starts again from step 0"
    )
    return f"{own} has no whole checkpoint: {reasons}. Put a whole one there; {begin}"


def mistakes(settings: Config) -> list[Mistake]:
    """What is wrong with how a run is to begin, as far as this process sees it without reading whole checkpoints."""
    key = "checkpoint.weights" if settings.checkpoint.weights else "checkpoint.resume"
    try:
        begun = plan(settings)
        if begun.checkpoint is None:
            return []
        found = differences(Manifest.read(begun.checkpoint).cursor.config, settings, weights=begun.weights)
    except CheckpointError as error:
        return [Mistake(key, str(error), is_local=True, is_file=True)]
    if not found:
        return []
    return [Mistake(key, f"{begun.checkpoint} does not fit: {'; '.join(found)}", OTHER, is_local=True, is_file=True)]


def keeps_folder(settings: Config) -> bool:
    """Whether the run goes on in its folder with what is there, or sets it aside."""
    begun = plan(settings)
    return begun.is_own or begun.aside
