"""Scaling efficiency against a stored baseline.

What a rank achieves now over what it achieved in the baseline, in model FLOP/s:

    E = (F / (N t)) / (F0 / (N0 t0))

with F model FLOPs of a step, N ranks, t seconds of a step. Two baselines make sense of it:

weak scaling    a step has the same tokens for each rank: E = t0 / t where the FLOPs of a token are the same, too.
strong scaling  a step has the same tokens in all: E = N0 t0 / (N t).

FLOPs, not tokens, since more ranks are often there for longer documents, whose attention costs more for each token.
Without a baseline, the waterfall tells another efficiency: the share of the time in which ranks compute. It does not see
what more ranks add to computation itself (smaller matrices, recomputation, padding); the baseline does.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from lsys.config import Config
from lsys.config.load import model_keys, resolved
from lsys.config.messages import from_validation
from lsys.config.mixers import paths
from lsys.config.model import Model
from lsys.config.user_code import UserCode
from lsys.runtime.environment import Launch
from lsys.runtime.groups import device_of

FORMAT = 1


class BaselineError(ValueError):
    """A baseline that cannot be used; every rank finds the same."""

    everywhere = True


@dataclass(frozen=True)
class Work:
    """What a step does. `model` is the section of the YAML, `tokens` are of all ranks."""

    model: dict[str, Any]
    precision: str
    recompute: str
    tokens: int

    @staticmethod
    def of(config: Config) -> Work:
        train = config.train
        return Work(resolved(config)["model"], train.precision, train.recompute, train.batch_tokens)


@dataclass(frozen=True)
class Record:
    """What a run achieved, as scaling.json in its folder keeps it: any run can be a later one's baseline.

    Attributes:
        ranks: N. step_seconds: t, the median of the reports but the first. flops: model FLOPs/s of one rank, likewise.
        hardware: name of the device of rank 0. parallel: degrees and methods.
        versions: of what it ran on. commit: of the source tree, "" where it is none.
        waterfall: s of each part of a step, the median of those of these reports that tell it; empty where none does.
    """

    work: Work
    ranks: int
    step_seconds: float
    flops: float
    hardware: str
    parallel: dict[str, Any]
    versions: dict[str, str]
    commit: str
    waterfall: dict[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it whole or not at all: a full disk leaves what was there. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> Record:
        """Raises BaselineError: the file is missing, or is not what `save` writes."""
        try:
            held = json.loads(path.read_text())
            if held.pop("format") != FORMAT:
                raise BaselineError(f"metrics.baseline {path} is of another format than {FORMAT}; record it again")
            return Record(**{**held, "work": Work(**held["work"])})
        except FileNotFoundError:
            remedy = "a run writes one as scaling.json in its train.folder, and lsys bench scaling one for each point"
            raise BaselineError(f"metrics.baseline {path} does not exist; {remedy}") from None
        except (OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise BaselineError(
                f"metrics.baseline {path} is no scaling.json of a run ({error}); name one, or leave the key out"
            ) from None


def kind_of_scaling(baseline: Record, work: Work, ranks: int) -> str:
    """ "weak" or "strong": what a run of `work` on so many ranks is beside the baseline; "weak" if it has the same ranks.

    Raises:
        BaselineError: they did other work; it says what differs.
    """
    differences = list(_differences(baseline.work, work))
    per_rank = work.tokens * baseline.ranks == baseline.work.tokens * ranks
    if not per_rank and work.tokens != baseline.work.tokens:
        differences.append(
            f"train.batch_tokens is {work.tokens:,} on {ranks} ranks, in the baseline {baseline.work.tokens:,} on "
            f"{baseline.ranks}: take {baseline.work.tokens * ranks // baseline.ranks:,} (as much for each rank, weak "
            f"scaling) or {baseline.work.tokens:,} (as much in all, strong scaling)"
        )
    if differences:
        raise BaselineError("the baseline did other work:\n  " + "\n  ".join(differences))
    return "weak" if per_rank else "strong"


def _differences(then: Work, now: Work) -> Iterator[str]:
    pairs: dict[str, tuple[Any, Any]] = {
        "train.precision": (then.precision, now.precision),
        "train.recompute": (then.recompute, now.recompute),
    }
    try:
        code = UserCode(paths(now.model["mixers"]))  # a baseline's model may name no other code than this run's
        before, after = (model_keys(work.model, code) for work in (then, now))
    except ValidationError as error:
        said = "; ".join(map(str, from_validation(error, Model)))
        raise BaselineError(f"the baseline's model is none that this lsys knows: {said}") from None
    pairs |= {f"model.{key}": (before.get(key), after.get(key)) for key in {**after, **before}}
    for key, (old, new) in pairs.items():
        if old != new:
            yield f"{key} is {new!r}, in the baseline {old!r}"


class Efficiency:
    """Efficiency of a run against a baseline.

    Args:
        path: of the baseline.

    Raises:
        BaselineError: the baseline cannot be read, or is of other work or hardware; it names the difference.
    """

    def __init__(self, path: Path, config: Config, ranks: int, hardware: str) -> None:
        self.baseline = Record.load(path)
        try:
            self.kind = kind_of_scaling(self.baseline, Work.of(config), ranks)
        except BaselineError as error:
            raise BaselineError(f"metrics.baseline {path}: {error}") from None
        if self.baseline.hardware != hardware:
            raise BaselineError(
                f"metrics.baseline {path} was measured on {self.baseline.hardware!r}, this is {hardware!r}: measure one here"
            )

    def percent(self, flops: float) -> float:
        """E of a rank that does so many model FLOP/s."""
        return 100 * flops / self.baseline.flops


def open_baseline(config: Config, launch: Launch) -> Efficiency | None:
    """That of `metrics.baseline`, if there is one. Raises BaselineError as `Efficiency` does."""
    path = config.metrics.baseline
    return None if path is None else Efficiency(path, config, launch.world_size, hardware_name(device_of(launch)))


class Report(NamedTuple):
    step_seconds: float
    flops: float
    waterfall: Mapping[str, float]


class History:
    """What the reports of a run said, for its `Record`: the first, and the latest 10,000 of the others."""

    def __init__(self) -> None:
        self._first: Report | None = None
        self._others: deque[Report] = deque(maxlen=10_000)

    def add(self, step_seconds: float, flops: float, waterfall: Mapping[str, float] | None = None) -> None:
        """Seconds of a step, model FLOP/s of a rank, mean s of the parts of a step if any was recorded."""
        report = Report(step_seconds, flops, waterfall or {})
        if self._first is None:
            self._first = report
        else:
            self._others.append(report)

    def record(self, config: Config, ranks: int, hardware: str) -> Record | None:
        """The run's figures over all reports but the first, in which things are set up; None if there is no report."""
        if self._first is None:
            return None
        steady = self._others or [self._first]
        falls = [each.waterfall for each in steady if each.waterfall]
        names = dict.fromkeys(part for fall in falls for part in fall)
        return Record(
            work=Work.of(config),
            ranks=ranks,
            step_seconds=statistics.median(each.step_seconds for each in steady),
            flops=statistics.median(each.flops for each in steady),
            hardware=hardware,
            parallel=config.parallel.model_dump(mode="json"),
            versions=versions(),
            commit=commit(),
            waterfall={part: statistics.median(fall.get(part, 0.0) for fall in falls) for part in names},
        )


def hardware_name(device: torch.device) -> str:
    """What the ranks compute on: the GPU's name, or the processor's and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("lsys", "torch", "megatron-core")}
    return {"python": platform.python_version(), **packages}


def commit() -> str:
    """Commit of the tree that this file is in, with "+" where it was changed; "" where it is installed without one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout

    try:
        if str(Path(__file__).name) not in git("ls-files", Path(__file__).name):
            return ""
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
