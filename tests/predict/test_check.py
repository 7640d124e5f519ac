"""`lsys check --hardware`: what it prints, what it refuses, and that it answers without torch."""

import subprocess
import sys

import pytest

from lsys.cli import main
from lsys.config.load import load
from lsys.config.messages import ConfigError
from lsys.mixers.registry import MIXERS
from lsys.observe.flops import training_flops
from lsys.predict.hardware import Hardware, hardware
from lsys.predict.hardware import load as load_calibration
from lsys.predict.plan import Plan
from lsys.predict.search import changed, nearest, overrides, search

LARGE = "configs/hybrid_7b_256k.yaml"


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(["check", LARGE, "--world-size", "512", *words]) == 0
    return capsys.readouterr().out


def test_memory_bytes_and_time(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "--hardware", "h100x8")
    for words in ("GiB of a rank, recompute full", "across nodes", "exposed_tensor", "bubble", "MFU", "GPU-hours"):
        assert words in text
    assert "does not fit" not in text


def cells(text: str, first: str) -> list[str]:
    """The other cells of the only row of a table that begins so."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"│ {first} ")]
    return [cell.strip() for cell in row.strip("│").split("│")[1:]]


def test_figures_of_the_run_follow_from_the_seconds_of_a_step(capsys: pytest.CaptureFixture) -> None:
    """By the definitions of MFU, tokens per second and hours, from data sheets: 989 TFLOP/s of an H100 in bf16."""
    text, config = printed(capsys, "--hardware", "h100x8"), load(LARGE)
    (shown,) = cells(text, "step")[:1]
    plan = Plan(config, 512, hardware("h100x8", "bf16", 8, config.model.cards.values()))
    seconds, train = plan.prediction.seconds, config.train
    assert shown == f"{1e3 * seconds:,.2f}"
    flops = sum(training_flops(config.model, [train.micro_batch_tokens]) for _ in range(config.micro_batches))
    assert cells(text, "MFU") == [f"{100 * flops / seconds / 512 / 989.4e12:.1f}%"]
    tokens, hours = train.batch_tokens / seconds / 512, train.steps * seconds / 3600
    assert cells(text, "tokens per second and GPU") == [f"{tokens:,.0f}"]
    assert cells(text, f"hours for {train.steps * train.batch_tokens:,} tokens") == [f"{hours:,.1f}"]
    assert cells(text, "GPU-hours") == [f"{512 * hours:,.0f}"]
    shares = [cells(text, name) for name, value in plan.prediction.parts.items() if value >= 1e-6]
    assert sum(float(share.rstrip("%")) for _, share in shares) == pytest.approx(100.0, abs=0.1 * len(shares))
    assert sum(float(each.replace(",", "")) for each, _ in shares) == pytest.approx(
        1e3 * seconds, abs=0.01 * len(shares)
    )


def test_without_hardware_memory_is_printed_and_no_time(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys)
    assert "GiB of a rank" in text and "predicted step" not in text


def test_unknown_hardware_is_said_once(capsys: pytest.CaptureFixture) -> None:
    text = printed(capsys, "--hardware", "z9000x8", "--search")
    assert text.count("z9000x8 is unknown: no times and no MFU") == 1
    assert "GiB of a rank" in text and "across nodes" in text and "predicted step" not in text


@pytest.mark.parametrize("name", ["h100 x 8", "h100x0", "missing.json", "configs/quickstart.json"])
def test_what_is_no_hardware_is_refused(capsys: pytest.CaptureFixture, name: str) -> None:
    assert main(["check", LARGE, "--world-size", "512", "--hardware", name]) == 2
    assert f"--hardware {name}".split(" ")[1][:4] in capsys.readouterr().err


def test_calibrations_are_advised_for_mixers_that_they_can_have() -> None:
    """Not for the user's own, subclasses of lsys's included; a variant is lsys's."""
    model, made = load(LARGE).model, type("Mine", (MIXERS["window"],), {"name": "mine", "letter": ""})
    known, mine = MIXERS["window"]("far", model, None), made("mine", model, None)
    for cards, named, advice in (
        ((known,), "far", "bench/predict.py makes a calibration"),
        ((mine,), "mine", "for mixers of your own there are only those of data sheets"),
        ((known, mine), "far, mine", "for mixers of your own there are only those of data sheets"),
    ):
        with pytest.raises(ConfigError, match=f"has no rates for {named} layers; {advice}"):
            Hardware("machine.json", 8, True).require(cards)


def test_what_does_not_fit_is_said_with_the_nearest_that_does(capsys: pytest.CaptureFixture) -> None:
    words = ("--train.recompute", "none", "--parallel.tensor", "2")
    text = printed(capsys, "--hardware", "h100x8", *words)
    assert "does not fit" in text
    line = next(line for line in text.splitlines() if line.startswith("nearest that does"))
    more = line.split(": ", 1)[1].split()
    assert "does not fit" not in printed(capsys, "--hardware", "h100x8", *words, *more)


def test_nearest_changes_one_key_if_that_does() -> None:
    config = changed(load(LARGE), {"train.recompute": "none", "parallel.tensor": 2, "parallel.context": 8})
    plan = Plan(config, 512, hardware("h100x8", "bf16"))
    assert not plan.fits
    found = nearest(plan)
    assert found is not None and len(found[0]) == 1 and found[1].fits


def test_search_proposes_what_fits_and_is_no_slower() -> None:
    machine, config = hardware("h100x8", "bf16"), load("configs/hybrid_1b.yaml")
    found = search(config, 64, machine, 3)
    times = [plan.prediction.seconds for _, plan in found]
    assert times == sorted(times) and all(plan.fits for _, plan in found)
    assert times[0] <= Plan(config, 64, machine).prediction.seconds
    assert overrides({"parallel.virtual_pipeline": 2}) == "--parallel.virtual-pipeline 2"


def test_parts_sum_to_the_step_and_a_calibration_reads_back(tmp_path) -> None:
    machine = hardware("h100x8", "bf16")
    prediction = Plan(load(LARGE), 512, machine).prediction
    assert sum(prediction.parts.values()) == pytest.approx(prediction.seconds)
    path = tmp_path / "machine.json"
    import json

    path.write_text(json.dumps(machine.to_json()))
    assert load_calibration(path) == machine == hardware(str(path), "fp32")


def test_a_calibration_of_links_that_there_are_not_is_refused(tmp_path) -> None:
    import json

    tree = hardware("h100x8", "bf16").to_json()
    tree["links"]["beside"] = tree["links"].pop("node")
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="is no calibration"):
        load_calibration(path)


def test_ranks_that_outnumber_cores_wait_for_them() -> None:
    config = changed(load(LARGE), {"parallel.pipeline": 1, "parallel.virtual_pipeline": 1})
    machine = hardware("h100x8", "bf16")
    shared = Hardware(**{**vars(machine), "cores": 4})
    alone, crowded = (Plan(config, 512, each).prediction for each in (machine, shared))
    assert crowded.parts["core"] == pytest.approx(alone.parts["compute"] + alone.parts["imbalance"], rel=0.01)


def test_check_with_hardware_imports_no_torch() -> None:
    code = (
        "import sys; from lsys.cli import main; "
        f"code = main(['check', {LARGE!r}, '--world-size', '512', '--hardware', 'h100x8']); "
        "assert not {'torch', 'megatron'} & sys.modules.keys(); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
