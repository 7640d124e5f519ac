"""Batch, micro-batch, window and degrees that change at resumes: every token of the stream is read once."""

import random
import shutil
from pathlib import Path
from typing import Any

from support.corpora import write_corpus

from bench.fault_parts.cases import drawn, outcome
from bench.fault_parts.ranks import everywhere, ranks
from bench.workers import faults as workers
from lsys.data.corpus import Corpus
from lsys.data.stream import TokenStream

TOKENS = 8000  # of the corpus, each once; more than a run reads
CHANGES = 5  # of a run at most
DEGREES: tuple[tuple[int, dict[str, int]], ...] = (
    (1, {}), (2, {}), (2, {"context": 2}), (2, {"tensor": 2}), (2, {"pipeline": 2}), (4, {}), (4, {"context": 2}),
    (4, {"tensor": 2}), (4, {"tensor": 2, "context": 2}), (4, {"pipeline": 2, "context": 2}),
)  # fmt: skip


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Runs of several starts each, until so many changes are made; the last start reads in order what windows left."""
    generator, cases = drawn(seed, "sizes"), list[dict[str, Any]]()
    with ranks() as pool:
        while len(cases) < count:
            path = folder / f"{len(cases)}"
            cases += _run(generator, pool, path, min(CHANGES, count - len(cases)))
            shutil.rmtree(path)
    return outcome(cases, "changes of batch, micro-batch, window or degrees at a resume, no token read twice or never")


def _leg(generator: random.Random, before: dict[str, Any] | None) -> dict[str, Any]:
    """What a start has, other than the one before it."""
    while True:
        count, degrees = generator.choice(DEGREES)
        replicas = count
        for degree in degrees.values():
            replicas //= degree
        micro = generator.randrange(8, 25)
        leg = {
            "ranks": count, "degrees": degrees, "batch": micro * replicas * generator.randrange(1, 4), "micro": micro,
            "window": generator.choice((0, 2, 3, 5, 8, 13)),
        }  # fmt: skip
        if leg != before:
            return leg


def _run(generator: random.Random, pool: Any, folder: Path, changes: int) -> list[dict[str, Any]]:
    """A case for each change; what is read at last tells of all whether a token was left out."""
    folder.mkdir(parents=True)
    ids = [(number * 7 + 3) % TOKENS for number in range(TOKENS)]  # each once, as 7 divides no power of 2 nor of 5
    ends = sorted({0, TOKENS, *(generator.randrange(1, TOKENS) for _ in range(60))})
    write_corpus(folder / "corpus", [ids[a:b] for a, b in zip(ends, ends[1:], strict=False)])
    found, total, step, cases = list[int](), 0, 0, list[dict[str, Any]]()
    leg, left = _leg(generator, None), 0
    for number in range(changes + 1):
        steps = generator.randrange(1, 4)
        if number == changes:
            leg |= {"window": 0}
            steps = max(steps, -(-left // leg["batch"]))
        left += leg["window"] * leg["micro"]  # the most that its window may leave behind
        step, total = step + steps, total + steps * leg["batch"]
        wrong, tokens = _start(pool, folder, step, leg, total)
        wrong = wrong or _twice(found, tokens)
        found += tokens
        if number:
            cases.append(leg | {"step": step, "good": not wrong} | ({"text": wrong} if wrong else {}))
        elif wrong:
            raise SystemExit(f"the run failed before its first change: {wrong}")
        leg = _leg(generator, leg)
    never = sorted(set(_first(folder / "corpus", total)) - set(found))
    if never or len(found) != total:
        text = f"{len(found)} tokens were read in {total}, and never {never[:20]}; {cases}"
        cases = [case | {"good": False, "text": case.get("text", text)} for case in cases]
    return cases


def _start(pool: Any, folder: Path, steps: int, leg: dict[str, Any], total: int) -> tuple[str, list[int]]:
    """("", the tokens of all ranks) of one start of the run, after which `total` are to have been counted; or what is wrong with it."""
    sizes = {
        "train__batch_tokens": leg["batch"],
        "train__micro_batch_tokens": leg["micro"],
        "data__shuffle_window": leg["window"],
    }
    degrees = {f"parallel__{axis}": degree for axis, degree in leg["degrees"].items()}
    changes = sizes | degrees | {"model__vocab": TOKENS}
    seen, failure = everywhere(pool, leg["ranks"], workers.read, folder, steps, changes)
    counted = max((rank["seen"] for rank in seen), default=0)
    wrong = failure or (f"n_tokens_seen is {counted} after {total} tokens" if counted != total else "")
    return wrong, [token for rank in seen for token in rank["tokens"]]


def _twice(before: list[int], tokens: list[int]) -> str:
    again = sorted(set(before) & set(tokens)) + sorted(token for token in set(tokens) if tokens.count(token) > 1)
    return f"read twice: {again[:20]}" if again else ""


def _first(corpus: Path, count: int) -> list[int]:
    """The first tokens of the stream of a corpus, read at once."""
    stream = TokenStream([Corpus.open(str(corpus))], [1.0], seed=0, split="train", validation_fraction=0.0)
    return stream.batch(0, count).tokens.tolist()
