"""The results as a page."""

from collections.abc import Sequence
from typing import Any

# Why a fault may survive, by what it changes: "file: old -> new".
REASONS: dict[str, str] = {}


def page(about: dict[str, Any], verdicts: Sequence[Any]) -> str:
    """Markdown: how many faults of each package the tests caught, and every one that survived, with the reason.

    Args:
        about: seed, count, commit, machine, minutes. verdicts: of all faults, in the order of judging.
    """
    counted = [verdict for verdict in verdicts if verdict.outcome != "no fault"]
    rows = ["| faults | caught | of |", "| --- | ---: | ---: |"]
    for group in sorted({verdict.group for verdict in counted}, key=lambda group: (group != "known", group)):
        these = [verdict for verdict in counted if verdict.group == group]
        rows.append(f"| {group} | {_caught(these)} | {len(these)} |")
    found = [verdict for verdict in counted if verdict.group != "known"]
    share = f"{_caught(found)} of {len(found)} drawn faults, {100 * _caught(found) / max(1, len(found)):.1f}%"
    dropped = len(verdicts) - len(counted)
    left = [verdict for verdict in counted if verdict.outcome == "survived"]
    lines = [
        "# Do the tests notice faults?",
        "",
        f"`python bench/mutations.py --seed {about['seed']} --count {about['count']}`; {about['machine']}; commit {about['commit']}; "
        f"{about['minutes']:.0f} minutes.",
        "",
        f"What `make test-fast` runs caught {share}; {dropped} more were drawn that do not import or stop the quickstart's first step.",
        "",
        *rows,
        "",
        "## Survivors",
        "",
        *([_survivor(verdict) for verdict in left] or ["None."]),
    ]
    return "\n".join(lines) + "\n"


def _caught(verdicts: Sequence[Any]) -> int:
    return sum(verdict.outcome == "caught" for verdict in verdicts)


def _survivor(verdict: Any) -> str:
    file = verdict.name.partition(":")[0]
    reason = REASONS.get(f"{file}: {verdict.old} -> {verdict.new}", "no reason known: a test is missing")
    return f"- {verdict.name}: `{' '.join(verdict.old.split())}` became `{' '.join(verdict.new.split())}`. {reason}."
