"""The host's judgement of a meeting: who is missing, and what is wrong by the rules."""

from collections.abc import Iterator, Sequence

from lsys.launch.preflight.finding import Finding, labels
from lsys.launch.preflight.rendezvous import Meeting
from lsys.launch.preflight.report import Report
from lsys.launch.preflight.rules import RULES, speeds


def judge(meeting: Meeting, nodes: int, expected: Sequence[str] = ()) -> list[Finding]:
    """Everything that is wrong, by all rules. `expected`: names or addresses of the nodes, where known."""
    reports = meeting.reports
    found = list(_missing(meeting, nodes, expected))
    for rule in RULES:
        found += rule(reports, labels(reports))
    return sorted(found, key=lambda finding: finding.warning)


def missing_nodes(reports: Sequence[Report], nodes: int, expected: Sequence[str] = ()) -> list[str]:
    """Who is not there: names where they are known, else numbers, else nothing."""
    if expected:
        here = {report.name for report in reports} | {report.address for report in reports}
        return [name for name in expected if name not in here and name.split(".")[0] not in here]
    numbers = {report.index for report in reports}
    return [] if -1 in numbers else [f"node {number}" for number in range(nodes) if number not in numbers]


def _missing(meeting: Meeting, nodes: int, expected: Sequence[str]) -> Iterator[Finding]:
    reports = meeting.reports
    names = dict(zip((r.address for r in reports), labels(reports), strict=True))
    if len(reports) < nodes:
        absent = missing_nodes(reports, nodes, expected)
        came = f"{len(reports)} of {nodes} nodes came: {', '.join(names.values())}"
        remedy = "start the same command there, and see what it says; a firewall may close the port"
        if meeting.strangers:
            remedy += f"; {', '.join(sorted(set(meeting.strangers)))} came with another job id"
        yield Finding(tuple(absent) or (f"{nodes - len(reports)} unknown",), f"did not come ({came})", remedy)
    for address, why in meeting.lost:
        yield Finding((names.get(address, address),), f"left during the preflight: {why}", "see what it printed")


def summary(meeting: Meeting, nodes: int) -> str:
    """One line: who came, how far their clocks and how fast their links are."""
    reports = meeting.reports
    parts = [f"{len(reports)} of {nodes} nodes"]
    if reports:
        parts[0] += f" x {reports[0].ranks} ranks"
    if len(reports) > 1:
        offsets = [report.offset for report in reports]
        parts.append(f"clocks within {1e3 * (max(offsets) - min(offsets)):.1f} ms")
        trips = sorted(trip for report in reports for trip in report.reach.values() if isinstance(trip, float))
        rates = sorted(rate for report in reports for rate in speeds(report))
        if trips:
            parts.append(f"round trips {_span([1e3 * trip for trip in trips], '.2f')} ms")
        if rates:
            parts.append(f"one stream {_span([rate / 1e6 for rate in rates], ',.0f')} MB/s")
    return f"{'; '.join(parts)}; {meeting.seconds:.1f} s"


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(values[0], form), format(values[-1], form)
    return low if low == high else f"{low} to {high}"
