"""The room that is asked for is what a checkpoint takes."""

from pathlib import Path
from typing import Any

import pytest
from support import parity, resuming

from lsys.predict.checkpoint import checkpoint_bytes

LARGE = dict(model__hidden=128, model__vocab=997, model__tied=False, model__layers=2, model__pattern="LS")
FIXED = 300_000  # bytes of names, random numbers and headers; 4 bytes a parameter are 1.3 million


def save(rank: int, world_size: int, changes: dict[str, Any], folder: Path) -> None:
    resuming.run(rank, world_size, changes, folder, stop=1, save=(1,))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_of_each_precision_and_optimizer(gloo: Any, tmp_path: Path, precision: str, distributed: bool) -> None:
    changes = LARGE | dict(train__precision=precision, optimizer__distributed=distributed)
    gloo(2, save, changes, tmp_path)
    taken = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert 0 < taken - checkpoint_bytes(parity.settings(**changes)) < FIXED
