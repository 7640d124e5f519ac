"""Outside cards and modules nothing decides by a mixer's letter, name, card or class."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lsys.mixers.registry import ALL, CARDS, CHANNEL_CARDS, CHANNELS, MIXERS

ROOT = Path(__file__).parents[2]


def deciding(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that know a mixer: constants that are its letter, its name or its module's class, strings of letters alone, imports of its card or module.

    The channel mixer `none`, "-", is known by imports only: both are words of other things too.
    """
    letters = {card.letter for card in (*CARDS, *CHANNEL_CARDS)} - {"", "-"}
    names = {*MIXERS, *CHANNELS, *(card.module.partition(":")[2] for card in ALL.values())} - {"", "none"}
    files = {f"{package}.{name}" for package in ("lsys.mixers", "lsys.model.mixers") for name in ALL}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in names or (node.value and set(node.value) <= letters):
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            whole = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            yield from ((node.lineno, name) for name in sorted(str(each) for each in whole) if name in files)


def test_nothing_but_cards_modules_and_tests_knows_a_mixer() -> None:
    found = []
    allowed = ("lsys/mixers/", "lsys/model/mixers/", *ALLOWED)
    for path in (p for folder in ("lsys", "parallel", "launch") for p in (ROOT / folder).rglob("*.py")):
        where = str(path.relative_to(ROOT))
        if not where.startswith(allowed):
            lines = deciding(ast.parse(path.read_text()))
            found += [f"{where}:{line} {what}" for line, what in lines if (where, what) not in WORDS]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        'kind == "S"', '{*"SW"} & kinds', 'kind in "LRGMD"', 'kind == "softmax"', 'card.name == "dense"', 'letter == "F"',
        "import lsys.mixers.window", "from lsys.mixers import window", "from lsys.mixers.none import NoChannels",
        "from lsys.model.mixers.softmax import SoftmaxMixer", 'type(module).__name__ == "SoftmaxMixer"',
    ],
)  # fmt: skip
def test_what_would_know_one_is_seen(line: str) -> None:
    assert list(deciding(ast.parse(line)))


ALLOWED = ("lsys/config/mixers.py",)  # old keys, by the names of the mixers that they went to
WORDS = {
    ("lsys/config/model.py", "'LLLS'"),  # defaults of two keys
    ("lsys/config/model.py", "'F'"),
    ("lsys/train/engine.py", "'WSD'"),  # what Megatron calls a schedule
    ("lsys/observe/profiler.py", "'M'"),  # a kind of events in traces
}
