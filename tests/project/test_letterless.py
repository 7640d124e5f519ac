"""A mixer of the registry needs no letter: there are 26 of them. Its name does wherever a letter would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[2]
FILE = str(ROOT / "configs" / "quickstart.yaml")
NAME, TITLE = "unlettered", "a mixer without a letter"


def register() -> None:
    """Put a token mixer without a letter into the registry, before anything has read it."""
    from lsys.mixers import registry
    from lsys.mixers.lightning import Lightning

    made: dict[str, Any] = {"name": NAME, "letter": "", "title": TITLE}
    card: Any = type("Unlettered", (Lightning,), made)
    registry.CARDS = (*registry.CARDS, card)
    registry.MIXERS[NAME] = registry.ALL[NAME] = card


def told() -> dict[str, Any]:
    """What a process with the mixer says of it."""
    register()
    from project.test_mixers_complete import check_plan

    from lsys.config.load import load
    from lsys.config.messages import ConfigError
    from lsys.config.model import Model
    from lsys.config.overrides import parse_overrides
    from lsys.config.rules import check
    from lsys.mixers.registry import CARDS, listed
    from lsys.predict.hardware import load as calibration

    check_plan(NAME)
    words = ["--model.pattern", f"[{NAME}, softmax]", f"--model.mixers.{NAME}.norm", "srms"]
    config = load(FILE, parse_overrides(words))
    try:
        calibration(ROOT / "tests" / "baseline" / "calibration.json").require(config.model.cards.values())
    except ConfigError as error:
        refused = str(error)
    return {
        "described": Model.model_fields["pattern"].description,
        "listed": listed(CARDS),
        "shortened": config.model.shortened(config.model.kinds[:2]),
        "norm": config.model.card(NAME).own.norm,
        "mistakes": [str(mistake) for mistake in check(config, 2)],
        "refused": refused,
    }


def test_it_is_described_checked_and_planned_by_its_name() -> None:
    code = "import json; from project.test_letterless import told; print(json.dumps(told()))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["described"].endswith(f"; `{NAME}`: {TITLE}.") and "``" not in found["described"]
    assert found["listed"].endswith(f", {NAME} ({TITLE})")
    assert found["shortened"] == f"{NAME},softmax" and found["norm"] == "srms" and not found["mistakes"]
    assert f"no rates for {NAME} layers" in found["refused"] and "bench/predict.py makes" in found["refused"]


def test_a_calibration_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rate that times of its layers ask for is fitted."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import predict
    from lsys.config.schema import Config
    from lsys.mixers.registry import CARDS

    config = Config.model_validate(predict.calibration_cases()[0].tree)
    assert {*config.model.kinds} == {card.name for card in CARDS}
    with patch.object(predict, "CARDS", (*CARDS, type("Unlettered", CARDS[:1], {"name": NAME, "letter": ""}))):
        for case in predict.calibration_cases():
            model = case.tree["model"]
            assert NAME in model["pattern"] or model["pattern"] == "LLLS"
            assert model["layers"] == len(model["pattern"])


def test_its_row_in_the_documentation_is_asked_for() -> None:
    from project.test_mixers_complete import check_rows

    from lsys.mixers.registry import CARDS, CHANNEL_CARDS

    page = (ROOT / "docs" / "concepts.md").read_text()
    unlettered: Any = type("Unlettered", CARDS[:1], {"name": NAME, "letter": ""})
    cards = (*CARDS, unlettered, *CHANNEL_CARDS)
    with pytest.raises(AssertionError):
        check_rows(page, cards)
    first = re.escape(f"| `{CHANNEL_CARDS[0].letter}`")
    check_rows(re.sub(f"^{first}", f"| `{NAME}` | {TITLE} | a state | |\n\\g<0>", page, flags=re.M), cards)
