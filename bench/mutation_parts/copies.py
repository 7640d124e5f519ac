"""Copies of the checkout in which tests run with faults planted, each with a server of forks."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.tree import ROOT


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended: pytest's exit code (None: it took longer than it may), the tests that failed, seconds."""

    code: int | None
    failed: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return self.code == 0


class Copy:
    """A copy of the commit and the server that runs tests in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.failures = folder / "checkout", folder / "log.txt", folder / "failures.json"
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
    def planted(self, texts: dict[str, str]) -> Iterator[None]:
        """Other texts in the place of files, until the block ends."""
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
        self.failures.unlink(missing_ok=True)
        found = self._ask("tests", limit, paths=list(paths), all=to_the_end, failures=str(self.failures))
        failed = json.loads(self.failures.read_text()) if self.failures.exists() else []
        return Outcome(found["code"], tuple(failed), found["seconds"])

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
