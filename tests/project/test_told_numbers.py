"""Numbers that pages tell are those of the code."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
# Page, sentence with the number in braces, and where the code has it.
TOLD: list[tuple[str, str, str, Any]] = [
    ("launch.md", "no answer in {:g} s; look at its interface", "lsys.launch.preflight.transport:CONNECT_SECONDS", None),
    ("launch.md", "at most {:g} s do; synchronise it", "lsys.launch.preflight.rules:CLOCK_SECONDS", None),
    ("launch.md", "is tried four times within {:g} s", "lsys.train.saving:PAUSES", sum),
    ("configuration.md", "is tried {} within", "lsys.train.saving:PAUSES", lambda pauses: {3: "four times"}[len(pauses)]),
    ("launch.md", "with up to {} others", "lsys.launch.preflight.rendezvous:MOST_ROUNDS", {7: "seven"}.get),
    ("launch.md", "| {} | stopped: `train.skip_limit`", "lsys.train.stopped:EXIT_CODE", None),
    ("monitoring.md", "run with exit code {} ([", "lsys.train.stopped:EXIT_CODE", None),
    ("monitoring.md", "norm of more than {:g} times the median", "lsys.train.skips:SPIKE", None),
    ("monitoring.md", "wait in memory ({} MiB, the oldest", "lsys.observe.events:MOST_WAITING", lambda size: size >> 20),
    ("quickstart.md", "not longer than {} GiB", "lsys.train.corpora:HASHED", lambda size: size >> 30),
    ("configuration.md", "files of up to {} GiB", "lsys.train.corpora:HASHED", lambda size: size >> 30),
    ("predictor.md", "{:.0%} of a GPU's memory", "lsys.predict.hardware:USABLE", None),
    ("reliability.md", "has not touched its file for {:g} s", "lsys.runtime.lock:QUIET_SECONDS", None),
    ("reliability.md", "is given {:g} s to end", "lsys.runtime.lock:QUIET_SECONDS", None),
    ("reliability.md", "lives is told within {:g} s", "lsys.runtime.lock:BEAT_SECONDS", None),
    ("reliability.md", "has {:g} s to show it", "lsys.checkpoint.agreed:VISIBLE_SECONDS", None),
    ("reliability.md", "or {} MiB of the optimizer", "lsys.checkpoint.shards:LARGEST", lambda numbers: 4 * numbers >> 20),
]  # fmt: skip


@pytest.mark.parametrize("page, sentence, where, said", TOLD, ids=lambda each: each if isinstance(each, str) else "")
def test_what_a_page_tells(page: str, sentence: str, where: str, said: Any) -> None:
    module, name = where.split(":")
    value = getattr(import_module(module), name)
    assert sentence.format(said(value) if said else value) in (DOCS / page).read_text()
