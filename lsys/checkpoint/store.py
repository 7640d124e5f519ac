"""The checkpoints of one run in one folder: written whole or not at all, kept as many as asked, verified before they are read."""

import errno
import functools
import logging
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from lsys.checkpoint.agreement import RankFailure, agree, agree_on_first
from lsys.checkpoint.choice import OTHER, look
from lsys.checkpoint.compatible import differences
from lsys.checkpoint.manifest import CheckpointError, Cursor, FileRecord, Manifest
from lsys.config import Config
from lsys.runtime.lock import LockError, LostError

if (
    TYPE_CHECKING
):  # at run time this would import torch.distributed's groups of Megatron, which wants to be prepared first
    from lsys.checkpoint.held import Held

logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder of a run's checkpoints, on a filesystem that all ranks share.

    A checkpoint is written into `step-00000040.partial`, synchronised with the disk and renamed to `step-00000040`; only then are
    older ones deleted. The newest is the one that was written last, which need not have the largest step: a run may go back.

    Args:
        folder: created by the first save.
        keep: how many whole checkpoints stay.
        guard: raises LockError where the folder is no longer this run's to write; the first rank asks it.
    """

    def __init__(self, folder: Path, keep: int, guard: Callable[[], None] | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept")
        self.folder, self.keep, self.guard = Path(folder), keep, guard or (lambda: None)

    def save(self, engine: "Held", cursor: Cursor) -> Path:
        """Write the engine's state and the cursor (collective). Inside, the engine's parameters must be settled.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on all ranks, if any could not write. What was there before is untouched.
            LostError: on all ranks, if another run has taken the folder over.
            ReplicaError: on all ranks, where those that have to hold the same do not. Nothing has been written.
        """
        from lsys.checkpoint.state import save_state, state_to_save

        if cursor.step < 1:  # Megatron stores no count of Adam's steps then
            raise CheckpointError(f"a checkpoint at step {cursor.step} holds nothing that the seed does not give")
        final = self.folder / f"step-{cursor.step:08d}"
        partial = final.with_name(f"{final.name}.partial")
        try:
            self._require_own()
            state = state_to_save(engine)
            serial = agree_on_first(lambda: self._prepare(partial))
            files = save_state(engine, state, partial)
            agree_on_first(lambda: self._commit(partial, final, _manifest(engine, cursor, serial, files)))
        except RankFailure as failure:
            try:
                self._require_own()  # else what is there may be the other run's
                text = agree_on_first(functools.partial(self._give_up, partial, cursor.step, failure))
            except RankFailure:
                text = f"checkpoint step {cursor.step} not written to {self.folder}: {failure}"
            raise CheckpointError(text) from failure
        agree_on_first(self._retain)
        return final

    def _require_own(self) -> None:
        """Raises LostError, and RankFailure where it cannot be known."""

        def taken() -> str:
            try:
                self.guard()
            except LockError as error:
                return str(error)
            return ""

        if text := agree_on_first(taken):
            raise LostError(text)

    def latest(self) -> Path | None:
        """The newest whole checkpoint by sizes; None if there is none. What is no whole checkpoint is logged and passed over."""
        found = look(self.folder)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for path, reason in found.passed_over.items():
                logger.warning("%s is passed over: %s", path, reason)
        return next(reversed(found.whole), None)

    def load(self, engine: "Held", path: Path) -> Cursor:
        """Verify a checkpoint and load it into an engine of any degrees of parallelism (collective).

        Raises:
            CheckpointError: on all ranks: no checkpoint, another format, another model, a file missing or changed, a pickle with
                more in it than a checkpoint needs. Nothing has been loaded then, except if a tensor turned out not to be there.
        """
        path = Path(path)
        try:
            manifest = agree(lambda: fitting(path, engine.settings))
            agree(lambda: manifest.verify(path, manifest.share(dist.get_rank(), dist.get_world_size())))
        except RankFailure as failure:
            raise CheckpointError(f"checkpoint {path} not loaded: {failure.messages}{others(path)}") from failure
        load_verified(engine, path, manifest)
        return manifest.cursor

    def _prepare(self, partial: Path) -> int:
        """Clear what earlier writes left behind, make the folder; the serial number of the new checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = look(self.folder)
        for (
            path,
            reason,
        ) in found.leftovers.items():  # what is damaged or of another format may be worth a look, and stays
            logger.warning("%s is removed: %s", path, reason)
            shutil.rmtree(path)
        partial.mkdir()
        return 1 + max((manifest.serial for manifest in found.whole.values()), default=0)

    def _commit(self, partial: Path, final: Path, manifest: Manifest) -> None:
        """Rename, after everything is on the disk. One of the same step stays until the new one has its name."""
        missing = manifest.incomplete(partial)
        if missing:
            raise CheckpointError(
                f"rank 0 does not see what others wrote ({missing}); train.folder must be on a shared filesystem"
            )
        self.guard()  # another run's save of this step would be in the same folder
        manifest.write(partial)
        _synchronise(partial)
        self.guard()
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _synchronise(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _retain(self) -> None:
        try:
            whole = list(look(self.folder).whole)
        except CheckpointError as error:  # the new one is written
            logger.warning("older checkpoints could not be looked at: %s", error)
            return
        for path in whole[: -self.keep]:
            going = path.with_name(
                f"{path.name}.deleted"
            )  # so that what an interrupted deletion leaves passes for no damaged one
            try:
                path.rename(going)
                shutil.rmtree(going)
            except OSError as error:
                logger.warning("%s could not be deleted: %s", path, error)

    def _give_up(self, partial: Path, step: int, failure: RankFailure) -> str:
        """Remove what was written; what happened, in words."""
        shutil.rmtree(partial, ignore_errors=True)
        whole = list(look(self.folder).whole)
        newest = f"the newest whole checkpoint is {whole[-1].name}" if whole else "there is no whole checkpoint yet"
        if any(code == errno.ENOSPC for code, _ in failure.errors.values()):
            return (
                f"checkpoint step {step} not written: no space left on {self.folder} (errno {errno.ENOSPC}); {newest}; "
                "free space, or lower checkpoint.keep"
            )
        return f"checkpoint step {step} not written to {self.folder}: {failure}; {newest}"


def fitting(path: Path, settings: Config, *, weights: bool = False) -> Manifest:
    """The manifest of a checkpoint that a run with these settings can load, or take the weights of. Raises CheckpointError."""
    manifest = Manifest.read(path)
    if found := differences(manifest.cursor.config, settings, weights=weights):
        raise CheckpointError(f"{'; '.join(found)}. {OTHER.capitalize()}")
    return manifest


def load_verified(engine: "Held", path: Path, manifest: Manifest) -> None:
    """Load a checkpoint whose files have been verified into an engine (collective). Raises CheckpointError on all ranks."""
    from lsys.checkpoint.state import load_state

    try:
        load_state(engine, path, manifest)
    except RankFailure as failure:
        raise CheckpointError(f"checkpoint {path} not loaded: {failure.messages}{others(path)}") from failure


def others(path: Path) -> str:
    """What else there is in the folder of a checkpoint that cannot be loaded."""
    there = [each.name for each in look(path.parent).whole if each.name != path.name]
    if not there:
        return f"; {path.parent} holds no other whole checkpoint"
    return f"; other whole checkpoints in {path.parent}: {', '.join(there)} (checkpoint.resume takes a path)"


def _manifest(engine: "Held", cursor: Cursor, serial: int, files: dict[str, FileRecord]) -> Manifest:
    from lsys.checkpoint.state import degrees

    versions = {name: version(name) for name in ("lsys", "torch", "megatron-core")}
    return Manifest(cursor, serial, dist.get_world_size(), degrees(engine), versions, files)


def _synchronise(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
