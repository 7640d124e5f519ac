"""A run that stops and resumes is the run that did not stop: bitwise at the same degrees, to rounding at others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import parity, resuming

TOLERANCE = 1e-5  # fp32, relative, after resharding
SAVED, STOP = 2, 5
SLOW = ("bf16, plain optimizer", "bf16 DP2, layers with a state", "TP2 to PP2xVPP2, plain optimizer")


def run(rank: int, world_size: int, changes: dict[str, Any], folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return resuming.run(rank, world_size, changes, folder, **options).__dict__


def straight(gloo: Any, ranks: int, changes: dict[str, Any], folder: Path) -> list[resuming.Seen]:
    seen = gloo(ranks, run, changes, folder, dict(stop=STOP, save=(SAVED,)))
    return [resuming.Seen(**each) for each in seen]


def resumed(gloo: Any, ranks: int, changes: dict[str, Any], folder: Path, stop: int = STOP) -> list[resuming.Seen]:
    seen = gloo(ranks, run, changes, folder, dict(stop=stop, load=f"step-{SAVED:08d}"))
    return [resuming.Seen(**each) for each in seen]


def whole(seen: list[resuming.Seen]) -> dict[str, torch.Tensor]:
    return parity.merge([parity.Outcome(pieces=each.pieces) for each in seen])[0]


SAME: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "plain optimizer": (1, {"optimizer__distributed": False}),
    "bf16": (1, {"train__precision": "bf16"}),
    "bf16, plain optimizer": (1, {"train__precision": "bf16", "optimizer__distributed": False}),
    "DP2": (2, {}),
    "PP2xVPP2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "bf16 DP2, layers with a state": (2, {"train__precision": "bf16", "model__pattern": "MDGS"}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in SAME])
def test_resumed_run_is_bitwise_the_straight_one(gloo: Any, tmp_path: Path, case: str) -> None:
    ranks, changes = SAME[case]
    for one, two in zip(straight(gloo, ranks, changes, tmp_path), resumed(gloo, ranks, changes, tmp_path), strict=True):
        assert two.losses == one.losses[SAVED:] and two.norms == one.norms[SAVED:] and two.rates == one.rates[SAVED:]
        assert two.counts == one.counts and set(two.counts) == {STOP}
        for (key, _, _, a), (_, _, _, b) in zip(one.pieces, two.pieces, strict=True):
            assert torch.equal(a, b), key


CHANNELS: dict[str, Any] = {
    "model__channels": ["dense", "none", "square", "star"],
    "model__mixers": {
        "square": {"kind": "dense", "activation": "relu2"},
        "star": {"kind": "dense", "activation": "starrelu"},
    },
}
RESHARD: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "one rank to DP2": (1, {}, 2, {}),
    "TP2 to PP2xCP2": (2, {"parallel__tensor": 2}, 4, {"parallel__pipeline": 2, "parallel__context": 2}),
    "TP2 to CP2, layers with a state": (
        2,
        {"parallel__tensor": 2, "model__pattern": "MDGS", "model__linear": {"key_heads": 2, "key_dim": 6}},
        2,
        {"parallel__context": 2, "model__pattern": "MDGS", "model__linear": {"key_heads": 2, "key_dim": 6}},
    ),
    "TP2 to CP2, channel mixers": (2, {"parallel__tensor": 2, **CHANNELS}, 2, {"parallel__context": 2, **CHANNELS}),
    "TP2 to PP2xVPP2, plain optimizer": (
        2,
        {"parallel__tensor": 2, "optimizer__distributed": False},
        2,
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "optimizer__distributed": False},
    ),
}


@pytest.mark.fault("resume at other degrees")
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in RESHARD])
def test_other_degrees_continue_the_run(gloo: Any, tmp_path: Path, case: str) -> None:
    ranks, changes, other_ranks, other_changes = RESHARD[case]
    one = straight(gloo, ranks, changes, tmp_path)
    two = resumed(gloo, other_ranks, other_changes, tmp_path)
    for each in two:
        assert each.losses == pytest.approx(one[0].losses[SAVED:], rel=TOLERANCE)
        assert each.norms == pytest.approx(one[0].norms[SAVED:], rel=TOLERANCE)
        assert each.rates == one[0].rates[SAVED:] and set(each.counts) == {STOP}


def test_parameters_are_bitwise_those_that_were_saved(gloo: Any, tmp_path: Path) -> None:
    tensor = {"parallel__tensor": 2}
    saved = [resuming.Seen(**each) for each in gloo(2, run, tensor, tmp_path, dict(stop=SAVED, save=(SAVED,)))]
    pipeline = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
    reference, loaded = whole(saved), whole(resumed(gloo, 2, pipeline, tmp_path, stop=SAVED))
    assert reference.keys() == loaded.keys() and all(torch.equal(reference[key], loaded[key]) for key in reference)


def test_learning_rate_of_the_configuration_counts(gloo: Any, tmp_path: Path) -> None:
    changes = {"optimizer__schedule": "constant", "optimizer__weight_decay": 0.0}
    gloo(1, run, changes, tmp_path, dict(stop=SAVED, save=(SAVED,)))
    (seen,) = resumed(gloo, 1, changes | {"optimizer__lr": 0.003}, tmp_path)
    assert seen.rates == [0.003] * (STOP - SAVED)


def without(rank: int, world_size: int, name: str, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resume with one of the remedies in lsys.checkpoint.optimizer taken away."""
    import contextlib

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.checkpoint import optimizer

    idle = contextlib.nullcontext if name == "own_hyperparameters" else lambda _: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, name, idle)
        return run(rank, world_size, changes, folder, dict(stop=STOP, load=f"step-{SAVED:08d}"))


@pytest.mark.parametrize("remedy", ["separate_steps", "own_hyperparameters"])
def test_each_remedy_changes_the_run(gloo: Any, tmp_path: Path, remedy: str) -> None:
    changes: dict[str, Any] = {"optimizer__schedule": "constant"}
    gloo(1, run, changes, tmp_path, dict(stop=SAVED, save=(SAVED,)))
    changes["optimizer__lr"] = 0.003
    (right,) = resumed(gloo, 1, changes, tmp_path)
    (wrong,) = gloo(1, without, remedy, changes, tmp_path)
    assert wrong["losses"] != right.losses
    assert wrong["counts" if remedy == "separate_steps" else "rates"] != (
        right.counts if remedy == "separate_steps" else right.rates
    )


def test_states_have_to_be_allocated_before_they_are_loaded(gloo: Any, tmp_path: Path) -> None:
    gloo(1, run, {}, tmp_path, dict(stop=SAVED, save=(SAVED,)))
    with pytest.raises(AssertionError, match="assert len.steps. == 1"):
        gloo(1, without, "allocate", {}, tmp_path)


def random_numbers(rank: int, world_size: int, folder: Path, saves: bool, changes: dict[str, Any]) -> list[float]:
    """What the generators give next, after saving or after loading into ones that have moved on."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from lsys.checkpoint import Checkpoints

    with resuming.engine_of(rank, world_size, changes) as engine:
        resuming.advance(engine, 0, 1, resuming.Seen())
        torch.manual_seed(rank + (17 if saves else 170))
        if saves:
            Checkpoints(folder, 1).save(engine, resuming.cursor_of(engine, 1))
        else:
            Checkpoints(folder, 1).load(engine, folder / "step-00000001")
        numbers = torch.rand(2).tolist()
        with get_cuda_rng_tracker().fork():
            return numbers + torch.rand(2).tolist()


def test_random_numbers_go_on_where_the_ranks_are_arranged_alike(gloo: Any, tmp_path: Path) -> None:
    saved = gloo(2, random_numbers, tmp_path, True, {})
    assert saved[0] != saved[1]
    assert gloo(2, random_numbers, tmp_path, False, {}) == saved
    elsewhere = gloo(2, random_numbers, tmp_path, False, {"parallel__tensor": 2})
    assert elsewhere[0][:2] != saved[0][:2] and elsewhere[1][:2] != saved[1][:2]
