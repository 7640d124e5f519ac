"""What came of each fault, on disk after each."""

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.mutation_parts.copies import Place


@dataclass(frozen=True)
class Verdict:
    """What came of a fault: "caught" by a test, "survived", "no fault" where it needs no test, or "open" if the nearest tests passed."""

    name: str
    group: str
    old: str
    new: str
    outcome: str
    by: str
    seconds: float
    changes: tuple[Place, ...]


class Judged:
    """Verdicts by key, on disk after each.

    Args:
        about: seed, commit and more, for the page; of verdicts that are there already what is said of them stays.
        again: whether what no test caught is judged anew, at the commit of `about`.
    """

    def __init__(self, out: Path, about: dict[str, Any], again: bool = False) -> None:
        self.out, self.about, self.lock = out, about, threading.Lock()
        self.verdicts: dict[str, Verdict] = {}
        if out.is_file():
            found = self.read(out)
            if found.about["seed"] != about["seed"]:
                raise SystemExit(f"{out} is of seed {found.about['seed']}, not {about['seed']}: take another --out")
            commits = [*found.about.get("again", []), *([about["commit"]] if again else [])]
            self.about = found.about | {"again": list(dict.fromkeys(commits))}
            self.verdicts = found.verdicts

    @classmethod
    def read(cls, path: Path) -> "Judged":
        """What a file has."""
        tree = json.loads(path.read_text())
        found = cls(Path(os.devnull), tree["about"])
        for key, verdict in tree["verdicts"].items():
            found.verdicts[key] = Verdict(**verdict | {"changes": tuple(map(tuple, verdict["changes"]))})
        return found

    def of(self, *outcomes: str) -> list[str]:
        """Keys of the faults with one of these outcomes."""
        return [key for key, verdict in self.verdicts.items() if verdict.outcome in outcomes]

    def add(self, key: str, verdict: Verdict) -> None:
        with self.lock:
            self.verdicts[key] = verdict
            self.write()
        print(f"{verdict.outcome:>8}  {verdict.name}  {verdict.seconds:.0f} s  {verdict.by}", flush=True)

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        tree = {"about": self.about, "verdicts": {key: asdict(verdict) for key, verdict in self.verdicts.items()}}
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(tree, indent=1) + "\n")
        partial.rename(self.out)
