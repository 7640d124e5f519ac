"""What `bench/faults.py` calls good: its judges see each way in which a run can end badly."""

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as path:  # bench is no installed package
    path.syspath_prepend(str(ROOT))
    from bench.fault_parts import flips, nan, sizes

NAME, FLIPPED = "decoder.layers.1.mlp.linear_fc2.weight", "exp_avg.decoder.layers.1.mlp.linear_fc2.weight"
DIFFERS = f"ranks that have to hold the same do not: rank 2 differs from ranks 0, 1 in optimizer.state.{FLIPPED}. A bit"
TWO = DIFFERS.replace("rank 2 differs from ranks 0, 1 in", "ranks 0, 1 hold different")


def a_run(folder: Path, steps: list[int]) -> Path:
    for step in steps:
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return folder


def flipped(text: str = DIFFERS, ranks: int = 3, **changes: Any) -> list[dict[str, Any]]:
    return [{"name": FLIPPED * (rank == ranks - 1), "error": text, "code": 1} | changes for rank in range(ranks)]


@pytest.mark.parametrize(
    "seen, steps, wrong",
    [
        (flipped(), [2], ""),
        (flipped(TWO, 2), [2], ""),
        (flipped(""), [2], "not told: rank 2"),
        (flipped(DIFFERS.replace("rank 2", "rank 0")), [2], "not told: rank 2"),
        (flipped(DIFFERS.replace("exp_avg.", "exp_avg_sq.")), [2], "not told: rank 2"),
        ([*flipped()[:2], flipped("another text: " + DIFFERS)[2]], [2], "exit codes"),
        (flipped(code=0), [2], "exit codes"),
        (flipped(), [2, 4], "checkpoints of steps [2, 4]"),
        (flipped(), [], "checkpoints of steps []"),
        (flipped(name=""), [2], "nothing was flipped"),
    ],
)
def test_a_flipped_bit(tmp_path: Path, seen: list[dict[str, Any]], steps: list[int], wrong: str) -> None:
    case = {"rank": len(seen) - 1, "step": 4}
    found = flips._wrong(a_run(tmp_path, steps), case, seen)
    assert found.startswith(wrong) if wrong else found == ""


def planted(step: int, rank: int = 1, code: int = 0, name: str = NAME) -> list[dict[str, Any]]:
    said = f"step {step}: no update was made: the gradient of {name} is not finite on rank {rank} (loss 2.3)"
    return [{"name": NAME, "said": said, "error": "", "code": code} for _ in range(2)]


@pytest.mark.parametrize(
    "step, seen, steps, wrong",
    [
        (3, planted(3), [2, 4, 6], ""),
        (4, planted(4), [2, 5, 6], ""),  # made up for after the next step
        (6, planted(6, code=1), [2, 4], ""),
        (3, planted(2), [2, 4, 6], "not told"),
        (3, planted(3, rank=0), [2, 4, 6], "not told"),
        (3, planted(3, name="decoder"), [2, 4, 6], "not told"),
        (4, planted(4), [2, 4, 6], "checkpoints of steps"),
        (6, planted(6), [2, 4], "exit codes"),
        (3, planted(3, code=1), [2, 4, 6], "exit codes"),
    ],
)
def test_a_number_that_is_not_finite(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    seen: list[dict[str, Any]],
    steps: list[int],
    wrong: str,
) -> None:
    import torch

    monkeypatch.setattr(nan, "stored", lambda path: {"a": torch.ones(2), "n": torch.arange(2)})
    case = {"rank": 1, "step": step, "module": ""}
    found = nan._wrong(a_run(tmp_path, steps), case, seen)
    assert found.startswith(wrong) if wrong else found == ""
    monkeypatch.setattr(nan, "stored", lambda path: {"a": torch.tensor([1.0, float("nan")])})
    assert nan._wrong(tmp_path, case, seen)


def test_a_token_that_is_read_twice() -> None:
    assert sizes._twice([1, 2, 3], [4, 5]) == ""
    assert sizes._twice([1, 2, 3], [4, 3]) == "read twice: [3]" and sizes._twice([], [4, 4]) == "read twice: [4]"
