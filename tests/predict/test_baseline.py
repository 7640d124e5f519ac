"""What the predictor said at commit 8598be0 of twelve drawn configurations and of every recipe, it says still."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.predictions import predictions

from lsys.config.rules import require
from lsys.config.schema import Config
from lsys.predict.hardware import hardware

BASELINE = Path(__file__).parents[1] / "baseline"
ROWS = json.loads((BASELINE / "predictions.json").read_text())


def numbers(tree: Any, above: str = "") -> dict[str, Any]:
    """The leaves of a tree by their paths; null is one."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if items is None:
        return {above: tree}
    return {path: leaf for key, value in items for path, leaf in numbers(value, f"{above}/{key}").items()}


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['ranks']} {row['name']} on {row['hardware']}" for row in ROWS])
def test_predictions_are_those_of_the_baseline(row: dict[str, Any]) -> None:
    config = Config.model_validate(row["tree"])
    require(config, row["ranks"])
    name = row["hardware"] if "." not in row["hardware"] else str(BASELINE / row["hardware"])
    found = numbers(predictions(config, row["ranks"], hardware(name, config.train.precision)))
    expected = numbers(row["told"])
    assert found.keys() == expected.keys()
    # Sums of fractions may be taken in another order; whole numbers are equal.
    assert found == {
        key: pytest.approx(value, rel=1e-9, abs=1e-15) if isinstance(value, float) else value
        for key, value in expected.items()
    }
