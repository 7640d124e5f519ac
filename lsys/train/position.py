"""Where a run goes on in its data: what a checkpoint says of it, held to the data that is there now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml

from lsys.checkpoint import choice
from lsys.checkpoint.manifest import CheckpointError, Manifest
from lsys.config import Config
from lsys.config.messages import ConfigError, Mistake

if TYPE_CHECKING:  # at run time this would import torch before what can be refused is refused
    from lsys.checkpoint import Cursor
    from lsys.data.corpus import Corpus
    from lsys.data.cursor import DataCursor
    from lsys.train.data import RunData
    from lsys.train.start import Begun

KEY = "data"  # among the cursor's extras: spans and identity
SIZES = ("train.batch_tokens", "train.micro_batch_tokens", "data.shuffle_window")


def saved(data: RunData, step: int, config: str, extra: dict[str, Any]) -> Cursor:
    """The cursor of a checkpoint after `step` steps; the first rank's, which writes it, tells what the data is."""
    from lsys.checkpoint import Cursor

    position, first = data.position.compact(step), data.groups.launch.rank == 0
    kept = {"spans": position.tree(), "identity": data.identity if first else None}
    return Cursor(step, position.tokens_seen(step), config, extra | {KEY: kept})


def resumed(data: RunData, begun: Begun) -> tuple[RunData, list[str]]:
    """(the data as it goes on where a run began; sentences about what is other than it was). Collective.

    Raises:
        ConfigError: on all ranks: the data is another one, and `data.restart` is not set.
        CheckpointError: on all ranks: the first one cannot look at the data.
    """
    from dataclasses import replace

    from lsys.checkpoint.agreement import RankFailure, agree_on_first
    from lsys.data.cursor import DataCursor, Span

    cursor, where = begun.cursor, begun.where
    if cursor is None:
        return data, []
    settings, step = data.settings, cursor.step
    try:
        found, unknown = agree_on_first(lambda: _differences(cursor, data.identity, where))
    except RankFailure as failure:
        raise CheckpointError(f"{where} is not gone on from: {failure.messages}") from failure
    if found and not settings.data.restart:
        raise ConfigError(found)
    sizes = settings.train.batch_tokens, settings.train.micro_batch_tokens, settings.data.shuffle_window
    if settings.data.restart and (found or unknown):
        position = DataCursor((Span(step, 0, *sizes),), settings.data.seed, before=cursor.tokens)
        text = f"data.restart: the data, another one than in {where}, begins at its first token"
        return data.at(position), [f"{text}; {cursor.tokens:,} tokens were read till then"]
    was = stored(cursor)
    position = replace(was, seed=settings.data.seed).changed(step, *sizes)
    said = [f"data.restart: the data is that of {where}, which goes on"] if settings.data.restart else []
    if unknown:
        text = f"{where} is of an earlier version: whether the tokens of {', '.join(unknown)} are what they were is not known"
        said.append(text)
    if position.spans[-1] != was.spans[-1]:
        pairs = zip(SIZES, was.sizes(step), sizes, strict=True)
        changes = ", ".join(f"{key} {before} -> {after}" for key, before, after in pairs if before != after)
        said.append(f"{changes}: every token is read once all the same")
    return data.at(position), said


def stored(cursor: Cursor) -> DataCursor:
    """The position that a checkpoint has; that of its configuration in those of before, which had one span."""
    from lsys.data.cursor import DataCursor

    tree = yaml.safe_load(cursor.config)
    train, data = tree["train"], tree["data"]
    span = {"step": 0, "token": 0, "shuffle_window": data.get("shuffle_window", 0)}
    span |= {key: train[key] for key in ("batch_tokens", "micro_batch_tokens")}
    spans = (cursor.extra.get(KEY) or {}).get("spans") or [span]
    return DataCursor.from_tree(spans, step=cursor.step, tokens=cursor.tokens, seed=data.get("seed", 0))


def refuse_other_data(settings: Config, corpora: Sequence[Corpus]) -> None:
    """Refuse to go on from a checkpoint of other data; before process groups start, on the first rank, which alone looks at content.

    It looks now also where nothing is compared but checkpoints are written: what they note is what was opened, whatever becomes of the files.

    Raises:
        ConfigError: every difference, with what makes it go on.
        CorpusError: a file cannot be read.
    """
    from lsys.data.identity import identity

    path = manifest = None
    try:
        path = None if (plan := choice.plan(settings)).weights else plan.checkpoint
        manifest = Manifest.read(path) if path else None
    except CheckpointError:  # told when it is to be loaded
        pass
    now = identity(settings, corpora) if path or settings.checkpoint.save else None
    if path and manifest and not settings.data.restart:
        found, _ = _differences(manifest.cursor, now, path.name)
        if found:
            raise ConfigError(found)


def _differences(cursor: Cursor, now: dict[str, Any] | None, where: str) -> tuple[list[Mistake], list[str]]:
    from lsys.data.identity import differences, identity_of_config

    was = (cursor.extra.get(KEY) or {}).get("identity") or identity_of_config(cursor.config)
    return differences(was, now, where) if now else ([], [])
