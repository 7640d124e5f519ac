"""Every GPU of the table is planned with, found by its name, and documented with the numbers that are in the table."""

import re
from pathlib import Path

import pytest

from lsys.cli import main
from lsys.parallel.gpus import GPUS, of_device, of_word, words
from lsys.predict.hardware import hardware

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| `(\w+)` \| ([\d.]+), ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| \S.* \|$",
    (ROOT / "docs" / "predictor.md").read_text(),
    re.M,
)


@pytest.mark.parametrize("word", words())
def test_a_run_on_it_has_times_and_mfu(word: str, capsys: pytest.CaptureFixture) -> None:
    words_ = ["check", str(ROOT / "configs" / "hybrid_1b.yaml"), "--world-size", "8", "--hardware", f"{word}x8"]
    assert main(words_) == 0
    text = capsys.readouterr().out
    assert f"predicted step on 8 x {word}x8" in text and "MFU" in text and "is unknown" not in text


def test_each_is_documented_with_its_numbers() -> None:
    told = {
        word: (gpu.bf16 / 1e12, gpu.fp32 / 1e12, gpu.memory / 1e9, gpu.bandwidth / 1e12)
        + (gpu.node.bandwidth / 1e9, gpu.network.bandwidth / 1e9)
        for word, gpu in zip(words(), GPUS.values(), strict=True)
    }
    found = {word: tuple(map(float, numbers)) for word, *numbers in ROWS}
    assert [row[0] for row in ROWS] == words() and found == {word: pytest.approx(row) for word, row in told.items()}


@pytest.mark.parametrize("name", GPUS)
def test_each_is_found_by_its_device_name_and_its_word(name: str) -> None:
    assert of_device(f"NVIDIA {name} 80GB HBM3") is GPUS[name]
    word = name.replace(" ", "").lower()
    assert of_word(word) is GPUS[name]
    assert hardware(f"{word}x4", "fp32").ranks_per_node == hardware(word, "fp32", 4).ranks_per_node == 4


@pytest.mark.parametrize(
    "name",
    ["RTX 3090 Ti", "RTX 4090 D", "RTX 4090 Laptop GPU", "RTX A6000 Max-Q", "H20-3e", "H100 80GB HBM3 MIG 1g.10gb"],
)
def test_a_card_of_another_name_is_not_taken_for_one_of_the_table(name: str) -> None:
    assert of_device(f"NVIDIA GeForce {name}") is None and of_device("NVIDIA GeForce RTX 3090") is GPUS["RTX 3090"]


def test_some_that_are_bound_by_what_they_are() -> None:
    """H100 and H20 differ in arithmetic alone; A100 and A800 in NVLink alone; a card without NVLink in its node."""
    h100, h20, a100, a800 = (GPUS[name] for name in ("H100", "H20", "A100", "A800"))
    assert h100.links == h20.links and h100.bf16 > 6 * h20.bf16
    assert a100.peaks == a800.peaks and a100.node.bandwidth == 1.5 * a800.node.bandwidth
    assert GPUS["L40S"].node.latency > h100.node.latency and of_device("Tesla T4") is None and of_word("t4") is None
