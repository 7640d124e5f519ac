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
        told = f"Of faults that once passed every test, single and many at once, {_caught(known)} of {len(known)} are caught."
        lines += ["", told, *(["", *_survivors(known)] if _caught(known) < len(known) else [])]
    for about, verdicts in runs:
        drawn = [verdict for verdict in verdicts if verdict.group != "known"]
        lines += ["", *_drawn(about, drawn)] if drawn else []
    return "\n".join(lines) + "\n"


def _drawn(about: dict[str, Any], verdicts: Sequence[Any]) -> list[str]:
    counted = [verdict for verdict in verdicts if verdict.outcome != "no fault"]
    left = [verdict for verdict in counted if verdict.outcome != "caught"]
    same = [verdict for verdict in left if _reason(verdict).startswith(SAME)]
    rest = len(counted) - len(same)
    shares = f"{_caught(counted)} of {len(counted)}, {100 * _caught(counted) / max(1, len(counted)):.1f}%"
    rows = ["| package | caught | of |", "| --- | ---: | ---: |"]
    for group in sorted({verdict.group for verdict in counted}):
        these = [verdict for verdict in counted if verdict.group == group]
        rows.append(f"| {group} | {_caught(these)} | {len(these)} |")
    return [
        f"## Drawn with seed {about['seed']}",
        "",
        f"`python bench/mutations.py --seed {about['seed']} --count {about['count']}`; {about['machine']}; commit {about['commit']}; "
        f"{about['minutes']:.0f} minutes.",
        "",
        f"What `make test-fast` runs caught {shares}; without the {len(same)} that change nothing, {_caught(counted)} of {rest}, "
        f"{100 * _caught(counted) / max(1, rest):.1f}%. {len(verdicts) - len(counted)} more were drawn that do not import or stop the "
        "quickstart's first step.",
        "",
        *rows,
        "",
        "Survivors:" if left else "None survived.",
        "",
        *_survivors(left),
    ]


def _survivors(verdicts: Sequence[Any]) -> list[str]:
    return [_survivor(verdict) for verdict in verdicts if verdict.outcome != "caught"]


def _caught(verdicts: Sequence[Any]) -> int:
    return sum(verdict.outcome == "caught" for verdict in verdicts)


def _survivor(verdict: Any) -> str:
    return f"- {verdict.name}: `{' '.join(verdict.old.split())}` became `{' '.join(verdict.new.split())}`. {_reason(verdict)}."


def _reason(verdict: Any) -> str:
    file = verdict.name.partition(":")[0]
    return REASONS.get(f"{file}: {verdict.old} -> {verdict.new}", "no reason known: a test is missing")
