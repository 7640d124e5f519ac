"""The results as a page."""

from collections.abc import Sequence
from typing import Any

SAME = "Nothing changes"  # what a reason begins with where a fault is none
# Why a fault may survive, by what it changes: "file: old -> new".
REASONS: dict[str, str] = {}


def page(runs: Sequence[tuple[dict[str, Any], Sequence[Any]]]) -> str:
    """Markdown: of each run how many faults of each package the tests caught, and every one that survived, with the reason.

    Args:
        runs: about (seed, count, commit, machine, minutes), and the verdicts of all faults in the order of judging.
    """
    lines = ["# Do the tests notice faults?"]
    known = [verdict for _, verdicts in runs for verdict in verdicts if verdict.group == "known"]
    if known:
        told = f"Of faults that once passed every test, single and many at once, {_caught(known)} of {len(known)} were caught."
        lines += ["", told, *_survivors(known)]
    for about, verdicts in runs:
        drawn = [verdict for verdict in verdicts if verdict.group != "known"]
        lines += ["", *_drawn(about, drawn)] if drawn else []
    return "\n".join(lines) + "\n"


def _drawn(about: dict[str, Any], verdicts: Sequence[Any]) -> list[str]:
    counted = [verdict for verdict in verdicts if verdict.outcome != "no fault"]
    same = [each for each in counted if each.outcome == "survived" and _reason(each).startswith(SAME)]
    rest = len(counted) - len(same)
    shares = f"{_caught(counted)} of {len(counted)}, {100 * _caught(counted) / max(1, len(counted)):.1f}%"
    again = f", what no test had caught again on {', '.join(about['again'])}" if about.get("again") else ""
    is_whole = all(each.outcome != "open" for each in counted)
    who = "What `make test-fast` runs" if is_whole else "The tests nearest to each, a minute or two of them,"
    rows = ["| package | caught | of |", "| --- | ---: | ---: |"]
    for group in sorted({verdict.group for verdict in counted}):
        these = [verdict for verdict in counted if verdict.group == group]
        rows.append(f"| {group} | {_caught(these)} | {len(these)} |")
    return [
        f"## Drawn with seed {about['seed']}",
        "",
        f"`python bench/mutations.py --seed {about['seed']} --count {about['count']}`; {about['machine']}; commit {about['commit']}{again}; "
        f"{about['minutes']:.0f} minutes.",
        "",
        f"{who} caught {shares}; without the {len(same)} that change nothing, {_caught(counted)} of {rest}, "
        f"{100 * _caught(counted) / max(1, rest):.1f}%. {len(verdicts) - len(counted)} more were drawn that do not import or stop the "
        "quickstart's first step.",
        "",
        *rows,
        *_survivors(counted),
    ]


def _caught(verdicts: Sequence[Any]) -> int:
    return sum(verdict.outcome == "caught" for verdict in verdicts)


def _survivors(verdicts: Sequence[Any]) -> list[str]:
    """Those that no test caught, and those that only the nearest tests have judged."""
    survived = [_survivor(verdict) for verdict in verdicts if verdict.outcome == "survived"]
    unjudged = [_survivor(verdict) for verdict in verdicts if verdict.outcome == "open"]
    lines = ["", "Survivors:", "", *survived] if survived else []
    return lines + (
        ["", "The nearest tests passed with these, all others have not judged them yet:", "", *unjudged]
        if unjudged
        else []
    )


def _survivor(verdict: Any) -> str:
    became = f"- {verdict.name}: `{' '.join(verdict.old.split())}` became `{' '.join(verdict.new.split())}`"
    return f"{became}. {_reason(verdict)}." if verdict.outcome == "survived" else became


def _reason(verdict: Any) -> str:
    file = verdict.name.partition(":")[0]
    return REASONS.get(f"{file}: {verdict.old} -> {verdict.new}", "no reason known: a test is missing")
