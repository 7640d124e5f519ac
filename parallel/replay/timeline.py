"""What came of a replay."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Share:
    """How one rank spent the time; the parts sum to the timeline's seconds.

    Attributes:
        compute: s of its own work.
        exposed: s of waiting for transfers, by axis: the part of each wait in which all who take part had come.
        waiting: s of waiting for other ranks to come to a transfer.
        idle: s from its end to the end of the last rank.
    """

    compute: float = 0.0
    exposed: dict[str, float] = field(default_factory=dict)
    waiting: float = 0.0
    idle: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """What came of the programs.

    Attributes:
        seconds: from the common start to the end of the last rank: the critical path.
        shares: of each rank.
    """

    seconds: float
    shares: tuple[Share, ...]

    @property
    def efficiency(self) -> float:
        """Mean of the ranks' computation, over the whole time; 1 if there is none."""
        return sum(share.compute for share in self.shares) / len(self.shares) / self.seconds if self.seconds else 1.0

    def exposed(self, axis: str | None = None) -> float:
        """Seconds that the ranks waited for transfers, on average."""
        chosen = (s for share in self.shares for a, s in share.exposed.items() if axis in (None, a))
        return sum(chosen) / len(self.shares)

    @property
    def parts(self) -> dict[str, float]:
        """Where the seconds go, on average: "compute", "exposed_AXIS" of each axis, and "waiting" for other ranks."""
        axes, ranks = sorted({axis for share in self.shares for axis in share.exposed}), len(self.shares)
        return {
            "compute": sum(share.compute for share in self.shares) / ranks,
            **{f"exposed_{axis}": self.exposed(axis) for axis in axes},
            "waiting": sum(share.waiting + share.idle for share in self.shares) / ranks,
        }

    def table(self) -> str:
        """A line for each rank; seconds."""
        lines = [f"{'rank':>5} {'compute':>11} {'exposed':>11} {'waiting':>11} {'idle':>11}"]
        for rank, share in enumerate(self.shares):
            parts = share.compute, sum(share.exposed.values()), share.waiting, share.idle
            lines.append(f"{rank:5} " + " ".join(f"{part:11.6f}" for part in parts))
        return "\n".join([*lines, f"total {self.seconds:11.6f}, efficiency {self.efficiency:.1%}"])
