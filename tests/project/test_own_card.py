"""The example's mixer, and cards of one's own, are held against what is built as lsys's are.

PYTHONPATH=FOLDER .venv/bin/python -m pytest tests/project/test_own_card.py --card my_package.cards:Mine
"""

from typing import Any

import pytest
from project.test_mixers_complete import changes, check_bytes, check_kept, check_memory, check_parameters, check_plan
from support import parity
from support.comparing import largest

EXAMPLE = "my_parts.cards:FeatureAttention"


def outcome(rank: int, world_size: int, changed: dict[str, Any]) -> Any:
    return parity.train(rank, world_size, changed).__dict__


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "card" in metafunc.fixturenames:
        metafunc.parametrize("card", [EXAMPLE, *metafunc.config.getoption("card")])


def test_a_run_of_it_is_planned(card: str) -> None:
    check_plan(card)


def test_its_parameters_and_products_are_those_of_the_built_module(gloo: Any, card: str) -> None:
    check_parameters(gloo, card)


def test_its_bytes_are_exact(gloo: Any, card: str) -> None:
    check_bytes(gloo, card)


def test_what_autograd_keeps_of_it_is_exact(gloo: Any, card: str) -> None:
    check_kept(gloo, card)


def test_its_peak_memory_is_known(gloo: Any, card: str) -> None:
    check_memory(gloo, card)


def test_two_tensor_times_two_context_ranks_equal_one(gloo: Any, card: str) -> None:
    one, many = (
        [parity.Outcome(**each) for each in gloo(ranks, outcome, changes(card, **degrees))]
        for ranks, degrees in ((1, {}), (4, {"tensor": 2, "context": 2}))
    )
    found = parity.difference(one, many)
    assert largest(found.values()) <= 1e-5, found
