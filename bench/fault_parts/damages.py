"""A checkpoint that is damaged, or that one rank sees otherwise than the others, is not trained from; whole ones go on being used."""

import hashlib
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from support import folders, stale

from bench.fault_parts.cases import drawn, outcome
from bench.fault_parts.ranks import everywhere, ranks
from bench.workers import faults as workers
from lsys.checkpoint import Manifest

RANKS, BATCH = 2, 10  # cases of one call of the workers
LIMIT = 180  # s of such a call: ranks that began differently may wait for each other for ever
NEWEST, PREVIOUS = workers.STEPS, workers.STEPS - workers.EVERY
FOLDER = "stale folder"  # the whole content of the previous checkpoint, under the newest one's name


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Damages of the newest of three checkpoints of two ranks: refused, renamed and told, and the previous one loaded."""
    generator, cases = drawn(seed, "damage"), list[dict[str, Any]]()
    with ranks() as pool:
        whole, digests = _whole(pool, folder)
        while len(cases) < count:
            planted = [
                _damaged(generator, whole, folder / f"{number}") for number in range(min(BATCH, count - len(cases)))
            ]
            runs = [path for path, _ in planted]
            seen, failure = everywhere(pool, RANKS, workers.begun, runs, [(0, "", "")] * len(runs), timeout=LIMIT)
            for number, (path, case) in enumerate(planted):
                each = [rank[number] for rank in seen]
                wrong = failure or _not_the_previous(path, each, digests)
                cases.append(case | {"good": not wrong} | ({"text": wrong} if wrong else {}))
                shutil.rmtree(path)
    kinds = Counter(case["kind"] for case in cases)
    return outcome(cases, f"refused, renamed, told, and the previous one used ({_list(kinds)})")


def run_stale(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """One rank sees an older listing, an older manifest or other bytes: all refuse, or all have the same checkpoint."""
    generator, cases = drawn(seed, "stale"), list[dict[str, Any]]()
    with ranks() as pool:
        whole, digests = _whole(pool, folder)
        hashed = sorted(Manifest.read(whole / "checkpoints" / _name(NEWEST)).files)
        while len(cases) < count:
            number = min(BATCH, count - len(cases))
            places = [(generator.randrange(RANKS), generator.choice(stale.KINDS)) for _ in range(number)]
            # other bytes of a file that another rank hashes are a fault that nothing here would notice, nor use
            views = [(rank, kind, generator.choice(hashed[rank::RANKS])) for rank, kind in places]
            runs = [Path(shutil.copytree(whole, folder / f"{place}")) for place in range(number)]
            seen, failure = everywhere(pool, RANKS, workers.begun, runs, views, timeout=LIMIT)
            for place, (rank, kind, file) in enumerate(views):
                each = [found[place] for found in seen]
                wrong = failure or _mixed(each, digests)
                case = {"rank": rank, "kind": kind, "file": file if kind == "bytes" else "", "good": not wrong}
                ended = "" if wrong else "refused" if "error" in each[0] else f"step {each[0]['step']} on all"
                cases.append(case | ({"text": wrong} if wrong else {"ended": ended}))
                shutil.rmtree(runs[place])
    return outcome(cases, f"no weights of two checkpoints ({_list(Counter(c['ended'] for c in cases if c['good']))})")


def _whole(pool: Any, folder: Path) -> tuple[Path, list[dict[int, str]]]:
    """A run's folder with three checkpoints, and each rank's digests of its parameters at each of them."""
    digests, failure = everywhere(pool, RANKS, workers.written, folder / "whole")
    if failure:
        raise SystemExit(f"the run that is to be damaged failed: {failure}")
    return folder / "whole", digests


def _damaged(generator: random.Random, whole: Path, target: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a run's folder whose newest checkpoint is really another one, and what was done."""
    while True:
        shutil.rmtree(target, ignore_errors=True)
        own = Path(shutil.copytree(whole, target)) / "checkpoints"
        newest, older = own / _name(NEWEST), own / _name(PREVIOUS)
        before = _content(newest)
        kind, file = generator.choice([*folders.KINDS, FOLDER]), generator.choice(_files(newest))
        place = random.Random(generator.random())
        if kind == FOLDER:
            shutil.rmtree(newest)
            shutil.copytree(older, newest)
        else:
            folders.damage(newest, file, kind, place, older)
        if _content(newest) != before:
            return target, {"kind": kind, "file": "" if kind == FOLDER else file}


def _not_the_previous(run: Path, seen: list[dict[str, Any]], digests: list[dict[int, str]]) -> str:
    """What is wrong with how ranks began after the newest was damaged; "" if nothing is."""
    name = f"{_name(NEWEST)}.damaged"
    there = sorted(path.name for path in (run / "checkpoints").iterdir())
    if there != sorted([*(_name(step) for step in digests[0] if step < NEWEST), name]):
        return f"the folder has {', '.join(there)}; ranks: {seen}"
    for found, known in zip(seen, digests, strict=True):
        if found.get("step") != PREVIOUS or found["digest"] != known[PREVIOUS]:
            return f"not the previous one was loaded: {seen}"
        if not any(name in line for line in found["lines"]):
            return f"the damage was not told: {seen}"
    return ""


def _mixed(seen: list[dict[str, Any]], digests: list[dict[int, str]]) -> str:
    """What is wrong with how ranks began that saw different things; "" if nothing is."""
    if all("error" in found for found in seen):
        return ""
    steps = {found.get("step") for found in seen}
    if len(steps) > 1 or any(
        found["digest"] != known[found["step"]] for found, known in zip(seen, digests, strict=True)
    ):
        return f"ranks did not begin alike: {seen}"
    return ""


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _files(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def _content(checkpoint: Path) -> dict[str, str]:
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in _files(checkpoint)}


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
