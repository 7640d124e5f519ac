"""A finding, and how values of several nodes are compared."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lsys.launch.preflight.report import Report


@dataclass(frozen=True)
class Finding:
    """One thing to put right, at `hosts`. A warning does not stop the job."""

    hosts: tuple[str, ...]
    problem: str
    remedy: str
    warning: bool = False

    def __str__(self) -> str:
        who = (
            ", ".join(self.hosts)
            if len(self.hosts) <= 8
            else f"{', '.join(self.hosts[:7])} and {len(self.hosts) - 7} more"
        )
        return f"{'warning: ' if self.warning else ''}{who}: {self.problem}; {self.remedy}"


def labels(reports: Sequence[Report]) -> list[str]:
    """A name for each node: its host name, with the address where several share it."""
    often = Counter(report.name for report in reports)
    return [r.name if often[r.name] == 1 else f"{r.name}/{r.address}" for r in reports]


def odd(
    names: Sequence[str], values: Sequence[Any], what: str, remedy: str, show: Callable[[Any], str] = str
) -> Iterator[Finding]:
    """The nodes whose value is not the usual one; of equally many, the host's is usual."""
    groups: dict[str, list[str]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(show(value), []).append(name)
    usual = max(groups, key=lambda shown: len(groups[shown]), default="")  # of equals, max takes the first
    others = groups.pop(usual, [])
    for shown, hosts in groups.items():
        where = others[0] if len(others) == 1 else f"{len(others)} other nodes"
        yield Finding(tuple(hosts), f"{what} {shown}, on {where} {usual}", remedy)


def everyone(hosts: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    return ("all nodes",) if len(hosts) == len(names) > 1 else tuple(hosts)


def size(count: int) -> str:
    return f"{count / (1 << 30):,.1f} GiB" if count >= (1 << 30) else f"{count / (1 << 20):,.0f} MiB"
