"""Fixtures of all tests, the sample of slow cases that `make test` takes, and the seconds of the tests that plant faults."""

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
from gloo import Pool
from support import fault_suite, sampling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers inherit it; all ranks share the machine's cores


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """`gloo(world_size, fn, *args)`: run fn(rank, world_size, *args) on every rank; see tests/gloo.py."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def measured(gloo: Pool) -> Callable[..., Any]:
    """As `gloo`, but each call runs once in a session: for functions whose results depend on their arguments alone."""
    found: dict[str, Any] = {}

    def call(world_size: int, fn: Callable[..., Any], *args: Any) -> Any:
        key = repr((world_size, fn.__qualname__, fn.__code__.co_filename, args))
        if key not in found:
            found[key] = gloo(world_size, fn, *args)
        return found[key]

    return call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", choices=["all", "sample"], default="all", help="cases of slow tests: every one, or some")
    card = "path of a card of your own, package.module:Card, for tests/project/test_own_card.py; may be repeated"
    parser.addoption("--card", action="append", default=[], help=card)
    parser.addoption(
        "--part", type=int, help="which part of the slow cases; if left out, the number of commits says so"
    )


def _part(config: pytest.Config) -> int:
    part = config.getoption("part")
    return (sampling.commits(config.rootpath) if part is None else part) % sampling.ONE_IN


FAULTS = pytest.StashKey[dict[str, float]]()  # seconds of the tests that plant faults, by their names


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("fault"):
        seconds = item.config.stash.setdefault(FAULTS, {})
        seconds[item.nodeid] = seconds.get(item.nodeid, 0.0) + report.duration
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if text := fault_suite.told(config.stash.get(FAULTS, {})):
        terminalreporter.write_line(text)
    if config.getoption("slow") == "sample":
        told = f"one in {sampling.ONE_IN} cases of slow tests, those of --slow sample --part {_part(config)}"
        terminalreporter.write_line(f"{told}; as many commits take each once, make test-all all of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gloo" in getattr(item, "fixturenames", ()):
            item.add_marker("world")
    if config.getoption("slow") == "sample":
        slow = [item.nodeid for item in items if item.get_closest_marker("slow")]
        dropped = sampling.left_out(slow, _part(config))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in dropped])
        items[:] = [item for item in items if item.nodeid not in dropped]
