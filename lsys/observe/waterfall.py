"""The waterfall: where the time of a training step goes.

| part | what it is |
|---|---|
| compute | work inside forward, backward and the optimizer's step, between operations of communication |
| exposed_AXIS | blocked in communication of that axis, from when all ranks that it needs had come to it |
| imbalance | blocked in communication before that: waiting for slower ranks |
| bubble | the same, for ranks of other pipeline stages |
| data | waiting for the next batch |
| checkpoint | writing a checkpoint, with its communication |
| core | ready to run, but waiting for a core (CPU runs on Linux) |
| report | the run's own measuring and reporting |
| other | between all these |

A step's time runs from the end of the step before to its own, without validation. A checkpoint and a report count to the
step that they delay. Each part is a sum of times between marks, `other` included, and the parts sum to the step's time.
On a GPU the times are those of the stream that computes: what it idles for lack of launched kernels is in `compute`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COMPUTE, IMBALANCE, BUBBLE, DATA, CHECKPOINT = "compute", "imbalance", "bubble", "data", "checkpoint"
CORE, REPORT, REST = "core", "report", "other"
EXPOSED = "exposed_"  # and the axis
TAGS, UNIT = "waterfall/", "(%)"  # around the part, in its tag


def part_names(axes: Iterable[str], *, ranks: int, stages: int, cores: bool) -> tuple[str, ...]:
    """The parts of a run, in the order in which they are shown.

    Args:
        axes: of communication. ranks, stages: of the run, of its pipeline. cores: whether waiting for one is measured.
    """
    waits = [IMBALANCE] * (ranks > 1) + [BUBBLE] * (stages > 1)
    return (COMPUTE, *map(exposed, axes), *waits, DATA, CHECKPOINT, *[CORE] * cores, REPORT, REST)


def exposed(axis: str) -> str:
    return EXPOSED + axis


def share_tag(part: str) -> str:
    """TensorBoard's tag of a part's share of the step, %."""
    return f"{TAGS}{part}{UNIT}"


def part_of(tag: str) -> str | None:
    """The part whose share a tag is; None for other tags."""
    return tag[len(TAGS) : -len(UNIT)] if tag.startswith(TAGS) and tag.endswith(UNIT) else None


@dataclass(frozen=True)
class Moved:
    """Communication of one axis, in a step, mean of the ranks.

    Attributes:
        bytes: that a rank sent. total: s from issue to completion, concurrent operations each; waiting for peers included.
        exposed: s that nothing hid; without waiting for peers.
    """

    bytes: float
    total: float
    exposed: float


@dataclass(frozen=True)
class Waterfall:
    """The recorded steps since the last report.

    Attributes:
        steps: how many they are.
        seconds: of one of them, mean of the ranks.
        parts: s of each part of a step, mean of the ranks; they sum to `seconds`. Zero parts are there, too.
        per_rank: of each rank, its own parts.
        moved: by axis; axes without operations are left out.
        notes: what is to be known of these figures, in words; each is said once in a run.
    """

    steps: int
    seconds: float
    parts: dict[str, float]
    per_rank: tuple[dict[str, float], ...]
    moved: dict[str, Moved]
    notes: tuple[str, ...] = ()

    @property
    def percent(self) -> dict[str, float]:
        """Each part's share of the step; 100 together."""
        return {part: 100 * seconds / self.seconds if self.seconds else 0.0 for part, seconds in self.parts.items()}

    @property
    def scalars(self) -> dict[str, float]:
        """TensorBoard's tags and values."""
        values = {share_tag(part): share for part, share in self.percent.items()}
        for axis, moved in self.moved.items():
            values[f"comm/{axis}/bytes"] = moved.bytes
            values[f"comm/{axis}/total(ms)"] = 1e3 * moved.total
            values[f"comm/{axis}/exposed(ms)"] = 1e3 * moved.exposed
        return values

    @property
    def line(self) -> str:
        """For the console: compute, and what else takes at least 1%, as "compute 81% exposed 9% imbalance 4%"."""
        shares: dict[str, float] = {}
        for part, share in self.percent.items():
            name = EXPOSED.rstrip("_") if part.startswith(EXPOSED) else part
            shares[name] = shares.get(name, 0.0) + share
        return " ".join(f"{name} {share:.0f}%" for name, share in shares.items() if name == COMPUTE or share >= 1)
