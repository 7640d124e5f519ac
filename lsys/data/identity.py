"""Which data a run reads: what a position in its stream means nothing without.

Everything that decides which token comes where and whether it counts: seed, shares, held-out fraction, order and content of the corpora, masks.
Where files lie does not matter.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lsys.config import Config
from lsys.config.messages import Mistake
from lsys.config.schema import Data
from lsys.data.corpus import FILES, MASKS, Corpus

RESTART = "or data.restart: true, which begins the new data at its first token while steps and weights go on"


def identity(settings: Config, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What the data is, JSON values: `seed`, `validation_fraction` and `corpora`, each with `path`, `share` of tokens and `files`.

    Of the files of a corpus that is no prepared one, such as a mask whose description is gone, samples and indices are hashed (`Corpus.content`).
    """
    found = _settings(settings.data)
    for named, corpus in zip(found["corpora"], corpora, strict=True):
        named["files"] = corpus.content
    return found


def identity_of_config(text: str) -> dict[str, Any]:
    """What a resolved configuration (YAML) alone says: without `files`."""
    return _settings(Data.model_validate(yaml.safe_load(text)["data"]))


def _settings(data: Data) -> dict[str, Any]:
    total = sum(corpus.weight for corpus in data.corpora)
    corpora = [{"path": str(corpus.path), "share": corpus.weight / total} for corpus in data.corpora]
    return {"seed": data.seed, "validation_fraction": data.validation_fraction, "corpora": corpora}


def differences(was: dict[str, Any], now: dict[str, Any], where: str) -> tuple[list[Mistake], list[str]]:
    """(why the position in `was` is none in `now`; what could not be compared, as a checkpoint of before has no `files`).

    Args:
        where: which checkpoint `was` is of.
    """
    found, unknown = [], []
    for key in ("seed", "validation_fraction"):
        if was[key] != now[key]:
            problem = f"{now[key]}, and {was[key]} in {where}, whose place in the data is one in that order"
            found.append(Mistake(f"data.{key}", problem, f"{was[key]}, {RESTART}"))
    old, new = was["corpora"], now["corpora"]
    names, theirs = (", ".join(corpus["path"] for corpus in each) for each in (new, old))
    if len(old) != len(new):
        found.append(_corpora("", f"{len(new)} corpora ({names}), and {len(old)} ({theirs}) in {where}", "take those"))
    elif names != theirs and _is_permuted(old, new):
        found.append(_corpora("", f"{names}, and in the order {theirs} in {where}", "take that order"))
    else:
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            found += _corpus(number, before, after, where)
            if "files" not in before:
                unknown.append(after["path"])
    return found, unknown


def _corpora(key: str, problem: str, fix: str) -> Mistake:
    return Mistake(f"data.corpora{key}", problem, f"{fix}, {RESTART}")


def _is_permuted(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> bool:
    """Whether the same corpora come in another order."""
    key = "files" if all("files" in corpus for corpus in old) else "path"
    before, after = ([json.dumps(corpus[key], sort_keys=True) for corpus in each] for each in (old, new))
    return before != after and sorted(before) == sorted(after)


def _corpus(number: int, before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[Mistake]:
    path, key = after["path"], f".{number}"
    if before["share"] != after["share"]:
        problem = f"{after['share']:.6g} of the tokens are of {path}, and {before['share']:.6g} in {where}"
        yield _corpora(f"{key}.weight", problem, "take those weights")
    if "files" not in before:
        if not _is_same_place(before["path"], path):
            problem = f"{path}, and {before['path']} in {where}, which tells corpora by their paths only"
            yield _corpora(f"{key}.path", problem, f"if it is the same corpus, link {before['path']}.bin to it")
        return
    files, now = before["files"], after["files"]
    if _differ(FILES, files, now):
        problem = f"{path} holds other tokens or documents than {before['path']}, which {where} was trained on"
        yield _corpora(f"{key}.path", problem, "put that corpus back")
    elif _differ(MASKS, files, now):
        had, has = (MASKS[0] in each for each in (files, now))
        problem = {
            (True, False): f"{path} has no loss mask, and had one in {where}",
            (False, True): f"{path} has a loss mask, and had none in {where}",
        }.get((had, has), f"the loss mask of {path} is another one than in {where}")
        yield _corpora(f"{key}.path", problem, "put that one back" if had else "take it away")


def _differ(endings: Sequence[str], before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether what both know of a file is not equal, or one has it and the other not."""
    for ending in endings:
        if (ending in before) != (ending in after):
            return True
        one, two = before.get(ending, {}), after.get(ending, {})
        if any(one[name] != two[name] for name in one.keys() & two.keys()):
            return True
    return False


def _is_same_place(old: str, new: str) -> bool:
    try:
        return os.path.abspath(old) == os.path.abspath(new) or os.path.samefile(f"{old}.bin", f"{new}.bin")
    except OSError:
        return False
