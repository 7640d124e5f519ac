"""Any one fact of any card, changed to another legal value, turns a check red that compares with something other than cards.

Only what is told changes: what was built, sent and alive is measured once, with the true cards, and taken again for each planted fact.
"""

import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from project import test_channels_complete as channels
from project import test_mixers_complete as mixers
from support import planted

from lsys.mixers.registry import CHANNELS, MIXERS

Check = Callable[[Any, str], None]
CHECKING = (
    "test_mixers_complete.py",
    "test_channels_complete.py",
    "support/steps.py",
)  # what a check asserts stands in
# Where heads are sent only peaks are compared, which do not tell at which of two moments these projections go.
ONLY_WHERE_NOTHING_IS_SENT = {"gla": ("kept.projections",)}

TOKEN_CHECKS = (mixers.check_parameters, mixers.check_kept, mixers.check_bytes, mixers.check_memory)
CHANNEL_CHECKS = (channels.check_parameters, channels.check_kept, channels.check_bytes, channels.check_memory)


def outcome(checks: Sequence[Check], gloo: Any, name: str) -> str:
    """`noticed` if a check says no, `refused` if what is told cannot be told at all, else `unnoticed`."""
    for check in checks:
        try:
            check(gloo, name)
        except Exception as error:
            inside = traceback.extract_tb(error.__traceback__)[-1].filename
            is_check = isinstance(error, AssertionError) and inside.endswith(CHECKING)
            return "noticed" if is_check else "refused"
    return "unnoticed"


def check_facts(checks: Sequence[Check], measured: Any, kind: type, name: str, parts: Sequence[str] = ()) -> None:
    """Each fact that a check asks for is noticed, whatever else it says."""
    with planted.watched(kind) as asked:
        assert outcome(checks, measured, name) == "unnoticed"
    unasked = {fact for fact in vars(kind) if fact in planted.facts(kind)} - asked.keys()
    assert not unasked, f"no check asks for {', '.join(sorted(unasked))}"
    found: dict[str, set[str]] = {}
    for attribute, values in asked.items():
        for value in values:
            for fact, change in planted.changes(kind, attribute, value, parts):
                with planted.changed(kind, attribute, change):
                    found.setdefault(fact, set()).add(outcome(checks, measured, name))
    only_once = ONLY_WHERE_NOTHING_IS_SENT.get(name, ())
    silent = {
        fact: said
        for fact, said in found.items()
        if "noticed" not in said or ("unnoticed" in said and fact not in only_once)
    }
    assert found and not silent, f"{len(silent)} of {len(found)} facts: {silent}"


def cases(names: Iterable[str], always: str) -> list[Any]:
    """Each takes some seconds; two are for every run."""
    return [pytest.param(name, marks=[] if name == always else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", cases(mixers.KINDS, always="phased"))
def test_a_changed_fact_of_a_token_mixer_is_noticed(measured: Any, name: str) -> None:
    parts = [*mixers.settings(name).model.cards[name].parts()]
    check_facts(TOKEN_CHECKS, measured, MIXERS[mixers.KINDS[name]], name, parts)


@pytest.mark.parametrize("kind", cases(channels.KINDS, always="starrelu"))
def test_a_changed_fact_of_a_channel_mixer_is_noticed(measured: Any, kind: str) -> None:
    check_facts(CHANNEL_CHECKS, measured, CHANNELS[channels.KINDS[kind][0]], kind)
