"""The pages that TensorBoard shows of five runs, in a real browser without a window. Skips where there is none."""

import contextlib
import json
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

import numpy as np
import pytest
import torch

from lsys.config.load import dump
from lsys.config.schema import Config
from lsys.data.corpus import Corpus
from lsys.observe.meter import Interval
from lsys.observe.reporter import Reporter
from lsys.observe.tensorboard import address
from lsys.observe.waterfall import Moved, Waterfall
from lsys.parallel.mesh import Mesh

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the page: a browser's own services want the network.
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
PARTS = ("compute", "exposed_context", "imbalance", "other")
RUNS = 5
PATIENCE = 90_000  # ms; the machine may be busy


def write_a_run(folder: Path, number: int) -> None:
    """Two ranks, of which the second is slow from step 5 on; resumed after step 6."""
    config = Config.model_validate(
        {
            "model": dict(layers=2, hidden=32, heads=4, ffn=64, vocab=64),
            "parallel": {"context": 2, "attention": ("ring", "gather", "auto")[number % 3]},
            "optimizer": {"beta2": 0.95 + number / 100} if number else {},
            "data": {"corpora": [{"path": "a"}]},
            "train": dict(folder=folder, steps=10, batch_tokens=4096, micro_batch_tokens=1024),
        }
    )
    corpus = Corpus("data/a", np.array([1000, 234]), np.array([0, 1000]), np.array([]))
    for first, last in ((1, 8), (7, 10)):
        reporter = Reporter(
            config, active=True, mesh=Mesh(2, context=2), nodes=(0, 1), device=torch.device("cpu"), peak=1e9, efficiency=None,
            first_step=first, text=dump(config), corpora=[(corpus, 1.0)],
        )  # fmt: skip
        for step in range(first, last + 1):
            slow = 1.0 if step < 5 else 1.5
            ranks = tuple(dict(zip(PARTS, row, strict=True)) for row in ((1, 0.2, slow - 1, 0.1), (slow, 0.2, 0, 0.1)))
            parts = {part: sum(rank[part] for rank in ranks) / 2 for part in PARTS}
            values = {"loss_metrics/global_avg_loss": 5 / step, "grad_norm": 1.0, "lr": 0.1, "n_tokens_seen": 1.0}
            waterfall = Waterfall(1, sum(parts.values()), parts, ranks, {"context": Moved(1e6, 0.3, 0.2)})
            reporter.training(step, Interval(1, 1.0, 0.0, 1, 1.0), values, waterfall)
        reporter.validation(last, 5 / last, None)
        reporter.close()


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
    folder = tmp_path_factory.mktemp("runs")
    for number in range(RUNS):
        write_a_run(folder / f"run{number}", number)
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


def fetched(page: Any, path: str) -> Any:
    """JSON of the server's own interface."""
    with urllib.request.urlopen(f"{page[1]}data/{path}", timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_five_runs_are_five_runs(page):
    assert sorted(fetched(page, "runs")) == [f"run{number}/tensorboard" for number in range(RUNS)]
    images = fetched(page, "plugin/timeseries/tags")["images"]["tagRunSampledInfo"]
    assert {tag: len(runs) for tag, runs in images.items()} == {"waterfall/all_parts": RUNS, "ranks/time": RUNS}


@pytest.mark.slow
def test_the_first_page_has_every_run_and_the_waterfalls_beside_their_curves(page):
    tab = show(page, "timeseries")
    groups = tab.locator("metrics-card-group-toolbar .group-title")
    card = tab.locator("scalar-card").filter(has_text="grad_norm")
    for number in range(RUNS):
        card.get_by_text(f"run{number}/tensorboard").first.wait_for()
    groups.filter(has_text="waterfall").click()
    pictures = tab.locator("image-card").filter(has_text="waterfall/all_parts")
    pictures.first.wait_for()
    for _ in range(RUNS):  # TensorBoard makes cards as they come near
        pictures.last.scroll_into_view_if_needed()
        tab.wait_for_timeout(500)
    pictures.nth(RUNS - 1).wait_for()
    assert pictures.count() == RUNS
    tab.locator("image-card img").first.wait_for()
    assert appears(tab, "waterfall/compute(%)")
    assert page[2] == []


@pytest.mark.slow
def test_the_address_that_a_run_says_has_the_losses_on_top(page):
    tab, server, _ = page
    tab.goto("about:blank")
    tab.goto(address(server.rstrip("/")))
    cards = tab.locator("scalar-card")
    for place, tag in enumerate(("global_avg_loss", "validation_loss")):
        cards.nth(place).get_by_text(tag, exact=False).first.wait_for()
        assert cards.nth(place).evaluate("card => card.closest('metrics-pinned-view') !== null")
    group = tab.locator("metrics-card-group-toolbar .group-title").first
    assert group.inner_text().startswith("comm")
    assert cards.nth(1).bounding_box()["y"] < group.bounding_box()["y"]


@pytest.mark.slow
def test_charts_of_several_lines_are_drawn(page):
    tab = show(page, "custom_scalars")
    assert appears(tab, "training") and appears(tab, "communication")
    for number, lines in enumerate((2 * RUNS, RUNS)):
        card = tab.locator("tf-custom-scalar-multi-line-chart-card").nth(number)
        card.scroll_into_view_if_needed()
        card.get_by_text(f"Matches ({lines})").wait_for()
    tab.wait_for_timeout(2000)
    assert page[2] == []  # what a chart cannot draw is one


@pytest.mark.slow
def test_pictures_and_texts_are_there(page):
    tab = show(page, "images")
    assert appears(tab, "waterfall/all_parts", exact=False) and appears(tab, "ranks/time", exact=False)
    tab = show(page, "text")
    assert all(appears(tab, name) for name in ("config", "ranks", "versions", "corpora"))


@pytest.mark.slow
def test_hyperparameters_that_differ_come_first(page):
    tab = show(page, "hparams")
    assert appears(tab, "parallel.attention", exact=False) and appears(tab, "optimizer.beta2", exact=False)
    found = fetched(page, "plugin/hparams/experiment?request=%7B%7D")["hparamInfos"]
    assert [info["name"] for info in found if info.get("differs")] == ["optimizer.beta2", "parallel.attention"]
    assert [info["name"] for info in found][:2] == ["optimizer.beta2", "parallel.attention"]
    assert "optimizer.eps" not in {info["name"] for info in found}
