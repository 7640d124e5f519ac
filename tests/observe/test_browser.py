"""The pages that a run's TensorBoard shows, in a real browser without a window. Skips where there is none."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lsys.config.load import dump
from lsys.config.schema import Config
from lsys.observe.tensorboard import Board
from lsys.observe.waterfall import Moved, Waterfall
from lsys.parallel.mesh import Mesh

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the page: a browser's own services want the network.
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
PARTS = ("compute", "exposed_context", "imbalance", "other")
PATIENCE = 90_000  # ms; the machine may be busy


def write_a_run(folder: Path) -> None:
    """Two ranks, of which the second is slow from step 5 on."""
    config = Config.model_validate(
        {
            "model": dict(layers=2, hidden=32, heads=4, ffn=64, vocab=64),
            "data": {"corpora": [{"path": "a"}]},
            "train": dict(folder=folder, steps=10, batch_tokens=4096, micro_batch_tokens=1024),
        }
    )
    board = Board(config, mesh=Mesh(2, context=2), nodes=(0, 1), first_step=1, text=dump(config))
    for step in range(1, 11):
        slow = 1.0 if step < 5 else 1.5
        ranks = tuple(dict(zip(PARTS, row, strict=True)) for row in ((1, 0.2, slow - 1, 0.1), (slow, 0.2, 0, 0.1)))
        parts = {part: sum(rank[part] for rank in ranks) / 2 for part in PARTS}
        board.scalars(step, {"loss_metrics/global_avg_loss": 5 / step, "throughput(tps)": 1000.0})
        board.waterfall(step, Waterfall(1, sum(parts.values()), parts, ranks, {"context": Moved(1e6, 0.3, 0.2)}))
    board.close()


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard of the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    address = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                    break
                time.sleep(0.3)
            yield address
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright drives the browser, and is not installed"
    )
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    folder = tmp_path_factory.mktemp("run")
    write_a_run(folder)
    with tensorboard(folder) as address, playwright.sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=browser, args=list(FLAGS), env={**os.environ})
        tab = window.new_page(viewport={"width": 1400, "height": 2400})
        tab.set_default_timeout(PATIENCE)
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        yield tab, address, errors
        window.close()


def show(page: Any, name: str) -> Any:
    tab, address, _ = page
    tab.goto("about:blank")
    tab.goto(f"{address}#{name}")
    return tab


def appears(tab: Any, text: str, exact: bool = True) -> bool:
    """Waits for it; a TimeoutError says that it does not."""
    place = tab.get_by_text(text, exact=exact).first
    place.wait_for()
    return place.is_visible()


@pytest.mark.slow
def test_the_groups_of_charts_are_there(page):
    tab = show(page, "custom_scalars")
    for title in ("training", "speed", "scaling waterfall", "parts and ranks", "communication", "memory"):
        assert appears(tab, title)
    stack = tab.locator("tf-custom-scalar-margin-chart-card")
    stack.scroll_into_view_if_needed()
    stack.get_by_text(f"Matches ({len(PARTS)})").wait_for()  # every part is a run of its own, and so has its colour
    tab.wait_for_timeout(2000)
    assert page[2] == []  # what a chart cannot draw is one


@pytest.mark.slow
def test_the_picture_of_the_ranks_the_grid_and_the_hyperparameters_are_there(page):
    assert appears(show(page, "images"), "ranks/time", exact=False)
    assert appears(show(page, "text"), "config")
    assert appears(show(page, "hparams"), "parallel.context", exact=False)
