"""Copies of the checkout in which tests run with faults planted, each with a server of forks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.common.tree import ROOT

Place = tuple[str, int, str, str]  # of a fault: file, offset in its text, old, new
NO_TESTS = 5  # pytest's exit code where it selected none
UNKNOWN = 4  # where there is no test of a name, say because a fault had named it


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended: pytest's exit code (None: it took longer than it may), the tests that failed, seconds, and those of each test."""

    code: int | None
    failed: tuple[str, ...]
    seconds: float
    of_tests: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.code == 0

    @property
    def has_ended(self) -> bool:
        """Whether all tests ran, so that all that fail are known."""
        return self.code in (0, 1, NO_TESTS)

    @property
    def notices(self) -> bool:
        """Whether a test failed, or pytest itself ended: in too long a run no test has told anything yet."""
        return bool(self.failed) or self.code not in (0, None, NO_TESTS)

    @property
    def by(self) -> str:
        return self.failed[0] if self.failed else f"pytest's exit code {self.code}" if self.notices else ""


class Copy:
    """A copy of the commit and the server that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.found = folder / "checkout", folder / "log.txt", folder / "found.json"
        self.usual: dict[str, float] = {}  # seconds that a test takes without a fault, by name
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.folder)], check=True)
        for data in (ROOT / "data").glob("stdlib.*"):
            (self.folder / "data").mkdir(exist_ok=True)
            os.symlink(data, self.folder / "data" / data.name)
        paths = [str(self.folder), str(self.folder / "tests"), str(self.folder / "examples")]
        temporary = folder / "tmp"
        temporary.mkdir()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)
        }  # fmt: skip
        words = [sys.executable, "-m", "bench.mutation_parts.server"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(words, cwd=self.folder, env=environment, stderr=subprocess.DEVNULL, **pipes)
        if not self._read().get("ready"):
            raise SystemExit("the server of forks did not start")

    def text(self, file: str) -> str:
        return (self.folder / file).read_text()

    @contextmanager
    def planted(self, places: Iterable[Place]) -> Iterator[None]:
        """Faults, which do not overlap, in their places, until the block ends."""
        texts = changed(self.text, places)
        before = {file: self.text(file) for file in texts}
        try:
            for file, text in texts.items():
                (self.folder / file).write_text(text)
            yield
        finally:
            for file, text in before.items():
                (self.folder / file).write_text(text)

    def first_step(self, limit: float) -> Outcome:
        """The first step of the README's run."""
        found = self._ask("quickstart", limit)
        return Outcome(found["code"], (), found["seconds"])

    def tests(self, paths: Sequence[str], limit: float, *, to_the_end: bool = False) -> Outcome:
        """Test files, or single tests, up to the first that fails, or all of them `to_the_end`."""
        found = self._tests(paths, limit, to_the_end)
        if found.code == UNKNOWN:
            found = self._tests([*dict.fromkeys(path.partition("::")[0] for path in paths)], limit, to_the_end)
        return found

    def _tests(self, paths: Sequence[str], limit: float, to_the_end: bool) -> Outcome:
        self.found.unlink(missing_ok=True)
        about = {"paths": list(paths), "all": to_the_end, "found": str(self.found), "usual": self.usual}
        answer = self._ask("tests", limit, **about)
        found = json.loads(self.found.read_text()) if self.found.exists() else {"failed": [], "seconds": {}}
        return Outcome(answer["code"], tuple(found["failed"]), answer["seconds"], found["seconds"])

    def end(self) -> None:
        self.server.kill()
        self.server.wait()

    def _ask(self, what: str, limit: float, **more: Any) -> dict[str, Any]:
        assert self.server.stdin
        print(
            json.dumps({"what": what, "limit": limit, "log": str(self.log), **more}), file=self.server.stdin, flush=True
        )
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.server.stdout
        line = self.server.stdout.readline()
        return json.loads(line) if line else {}


def changed(text_of: Callable[[str], str], places: Iterable[Place]) -> dict[str, str]:
    """Texts of the files with faults in them, which do not overlap."""
    texts: dict[str, str] = {}
    from_the_end = sorted(places, key=lambda place: -place[1])  # what is before stays where it is
    for file, start, old, new in from_the_end:
        text = texts.get(file) or text_of(file)
        if not text.startswith(old, start):
            raise SystemExit(f"{old!r} is not at {start} of {file} any more: take another --out")
        texts[file] = text[:start] + new + text[start + len(old) :]
    return texts
