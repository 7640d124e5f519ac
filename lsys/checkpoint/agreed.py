"""The checkpoint that all ranks begin with: the first rank chooses, every rank says what it reads of it, and all check it together."""

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from lsys.checkpoint.agreement import RankFailure, agree, agree_on_first
from lsys.checkpoint.choice import NAMES, Plan, look, plan
from lsys.checkpoint.manifest import NAME, CheckpointError, Manifest, digest
from lsys.checkpoint.starts import FOLDER
from lsys.checkpoint.store import others
from lsys.config import Config

VISIBLE_SECONDS = 15.0  # how long a filesystem that nodes share may take to show on one what is there on another
SHARED = "checkpoints must be on one filesystem that all ranks share: mount it on every node, and start again"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What all ranks begin with.

    Attributes:
        plan: of the first rank.
        manifest, digest: of its checkpoint, and the SHA-256 of the manifest's file; None and "" where there is no checkpoint.
        passed: what was damaged on the way to it, in words.
    """

    plan: Plan
    manifest: Manifest | None = None
    digest: str = ""
    passed: tuple[str, ...] = ()


def choose(settings: Config, guard: Callable[[], None] = lambda: None) -> Chosen:
    """The checkpoint to begin with, whole to the last byte, the same on every rank (collective).

    The first rank goes from the newest to older ones. A damaged one of the run's own is renamed, told, and never deleted.

    Args:
        guard: raises where the folder is no longer this run's; the first rank asks it before it renames.

    Raises:
        CheckpointError: on all ranks: there is none to begin with, or the ranks do not see the same.
    """
    passed: dict[Path, str] = {}
    told: list[str] = []
    try:
        _require_newest(settings)
        while True:
            begun: Plan = agree_on_first(lambda: plan(settings, passed))
            if not begun.aside:
                told += agree_on_first(lambda: _rename_damaged(settings, guard))
            path = begun.checkpoint
            if path is None:
                return Chosen(begun, passed=tuple(told))
            if path in passed:
                raise CheckpointError(
                    f"{path} was found damaged and is there again under this name: {passed[path]}; move it away"
                )
            expected = agree_on_first(functools.partial(digest, path))
            manifest = agree(functools.partial(_same, path, expected))
            damage = _damage(path, manifest)
            if not damage:
                return Chosen(begun, manifest, expected, tuple(told))
            if begun.is_named:
                raise CheckpointError(f"checkpoint {path} not loaded: {damage}{others(path)}")
            passed[path] = damage
            if begun.is_own:
                told.append(agree_on_first(functools.partial(_rename, path, damage, guard)))
            else:
                told.append(_tell(f"{path} is damaged and passed over: {damage}"))
    except RankFailure as failure:
        text = failure.messages if set(failure.errors) == {0} else str(failure)
        raise CheckpointError(text) from failure


def _tell(text: str) -> str:
    """At once, since the run may end before it reports."""
    if dist.get_rank() == 0:
        logger.warning("%s", text)
    return text


def _rename_damaged(settings: Config, guard: Callable[[], None]) -> list[str]:
    found = look(settings.train.folder / FOLDER).damaged
    named = {path: NAMES.fullmatch(path.name) for path in found}
    fresh = [path for path, match in named.items() if match and not (match[2] or "").startswith(".damaged")]
    return [_rename(path, found[path], guard) for path in fresh]


def _rename(path: Path, damage: str, guard: Callable[[], None]) -> str:
    """Give a damaged checkpoint a name by which no run takes it; what was done, in words."""
    guard()
    match = NAMES.fullmatch(path.name)
    name = f"{match[1] if match else path.name}.damaged"
    target, count = path.with_name(name), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{name}-{count}")
    try:
        path.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{path} is damaged ({damage}) and could not be renamed to {target.name}: {error.strerror}; move it away"
        ) from error
    return _tell(f"{path} is damaged and is now {target.name}: {damage}")


def _same(path: Path, expected: str) -> Manifest:
    """The manifest, if this rank reads the one that the first rank read, with files of the sizes that it lists; else CheckpointError."""
    content, reason = b"", ""

    def is_there() -> bool:
        nonlocal content, reason
        try:
            content = (path / NAME).read_bytes()
        except OSError as error:
            reason = f"{path}, which rank 0 reads, cannot be read here: {error.strerror}"
            return False
        found = hashlib.sha256(content).hexdigest()
        reason = f"{path / NAME} has SHA-256 {found[:12]}... here, and {expected[:12]}... on rank 0"
        return found == expected

    if not _wait(is_there):
        raise CheckpointError(f"{reason}; {SHARED}")
    return Manifest.read_bytes(path, content)


def _damage(path: Path, manifest: Manifest) -> str:
    """What is wrong with a checkpoint's files, "" if nothing is (collective): each rank reads a part of them.

    Raises RankFailure where a rank reads something else than the first one.
    """

    def check(names: list[str]) -> str:
        try:
            manifest.verify(path, names)
        except CheckpointError as error:
            if type(error) is not CheckpointError:  # not damaged, but not to be read
                raise
            return str(error)
        return ""

    ranks = dist.get_world_size()
    parts = [manifest.share(rank, ranks) for rank in range(ranks)]
    mine = agree(lambda: check(parts[dist.get_rank()]))
    found: list[str] = [""] * ranks
    dist.all_gather_object(found, mine)
    if not any(found):
        return ""
    suspects = [name for each in range(ranks) if found[each] for name in parts[each]]
    damage = agree_on_first(lambda: check(suspects))
    if not damage:
        seen = "; ".join(f"rank {each}: {text}" for each, text in enumerate(found) if text)
        raise CheckpointError(f"rank 0 reads {path} as it was written, others do not: {seen}; {SHARED}")
    return damage


def _require_newest(settings: Config) -> None:
    """Refuse to begin where a rank sees a newer checkpoint of the run than the first one (collective): its listing is out of date."""
    own = settings.train.folder / FOLDER
    mine = agree(lambda: {path.name: manifest.serial for path, manifest in look(own).whole.items()})
    seen: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(seen, mine)
    newer = {
        name: rank
        for rank, each in enumerate(seen)
        for name, serial in each.items()
        if serial > max(seen[0].values(), default=0)
    }

    def require() -> None:
        if not _wait(lambda: newer.keys() <= {path.name for path in look(own).whole}):
            name, rank = next(iter(newer.items()))
            why = look(own).passed_over.get(own / name, "it is not there")
            raise CheckpointError(f"rank {rank} sees {own / name}, rank 0 does not ({why}); {SHARED}")

    if newer:
        agree_on_first(require)


def _wait(condition: Callable[[], bool]) -> bool:
    """Whether it holds at last."""
    end = time.monotonic() + VISIBLE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
    return True
