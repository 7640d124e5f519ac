"""States of modules that are no parameters: saved, resharded, bit for bit; and the modules are told of steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import states

SAVED, STOP = 2, 4
DEGREES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"parallel__tensor": 2}),
    "PP2xVPP2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "CP2": (2, {"parallel__context": 2}),
    "DP2": (2, {}),
    "TP2xCP2": (4, {"parallel__tensor": 2, "parallel__context": 2}),
}


def run(rank: int, world_size: int, changes: dict[str, Any], folder: Path, options: dict[str, Any]) -> Any:
    return states.run(rank, world_size, changes, folder, **options)


def require_known(ranks: list[dict[str, Any]], steps: int) -> None:
    """Every rank's states are their part of those known by hand, bit for bit, and none is missing."""
    known, seen = states.known(steps), set()
    for each in ranks:
        for (layer, name, first), state in each["states"].items():
            exact = known[layer, name][first : first + len(state)]
            assert state.dtype == exact.dtype and torch.equal(state, exact), (layer, name, first)
            seen |= {(layer, name, first + place) for place in range(len(state))}
    assert seen == {(layer, name, place) for (layer, name), state in known.items() for place in range(len(state))}


@pytest.mark.parametrize("case", ["one rank", "TP2", "PP2xVPP2", "CP2", "DP2"])
def test_a_resumed_run_is_bitwise_the_straight_one(gloo: Any, tmp_path: Path, case: str) -> None:
    ranks, changes = DEGREES[case]
    straight = gloo(ranks, run, changes, tmp_path, dict(stop=STOP, save=SAVED))
    resumed = gloo(ranks, run, changes, tmp_path, dict(stop=STOP, load=SAVED))
    require_known(straight, STOP)
    require_known(resumed, STOP)
    for one, two in zip(straight, resumed, strict=True):
        assert two["losses"] == one["losses"][SAVED:] and two["norms"] == one["norms"][SAVED:]


@pytest.mark.parametrize(
    "before, after",
    [
        ("TP2", "PP2xVPP2"),
        ("PP2xVPP2", "CP2"),
        ("DP2", "TP2"),
        pytest.param("TP2xCP2", "one rank", marks=pytest.mark.slow),
        pytest.param("CP2", "TP2xCP2", marks=pytest.mark.slow),
    ],
)
def test_they_are_resharded_bit_for_bit(gloo: Any, tmp_path: Path, before: str, after: str) -> None:
    straight = gloo(*_of(before), tmp_path, dict(stop=STOP, save=SAVED))
    loaded = gloo(*_of(after), tmp_path, dict(stop=SAVED, load=SAVED))
    require_known(loaded, SAVED)
    for each in gloo(*_of(after), tmp_path, dict(stop=STOP, load=SAVED)):
        assert each["losses"] == pytest.approx(straight[0]["losses"][SAVED:], rel=1e-5)


def _of(case: str) -> tuple[Any, ...]:
    ranks, changes = DEGREES[case]
    return ranks, run, changes


def devices(rank: int, world_size: int) -> set[str]:
    """Where a model's parameters and buffers are whose device is another one than torch's own; states of modules are made on torch's."""
    from unittest import mock

    from support import parity

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.model.hybrid import HybridModel
    from lsys.model.megatron_config import transformer_config
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    config = parity.settings()
    with (
        process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups,
        states.stateful(),
        mock.patch("lsys.model.hybrid.own_device", lambda: torch.device("meta")),
    ):
        place = transformer_config(config), groups.collection, groups.context
        model = HybridModel(config, *place, pre_process=True, post_process=True)
        return {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}


def test_they_are_where_the_model_is(gloo: Any) -> None:
    assert gloo(1, devices) == [{"meta"}]


@pytest.mark.parametrize("case", ["PP2xVPP2", "TP2"])
def test_all_chunks_are_told_when_steps_begin_and_end(gloo: Any, tmp_path: Path, case: str) -> None:
    layers: list[set[int]] = []
    for each in gloo(*_of(case), tmp_path, dict(stop=STOP)):
        mine = sorted({layer for _, layer, _ in each["told"]})
        layers.append(set(mine))
        expected = [(what, layer, step) for step in range(1, STOP + 1) for what in ("begin", "end") for layer in mine]
        assert each["told"] == expected
    assert set.union(*layers) == {1, 2, 3}


def test_the_loss_depends_on_them(gloo: Any, tmp_path: Path) -> None:
    with_states = gloo(1, run, {}, tmp_path, dict(stop=2))[0]
    without = gloo(1, run, {}, tmp_path, dict(stop=2, has_state=False))[0]
    assert with_states["losses"][1] != without["losses"][1]


def refused(rank: int, world_size: int, folder: Path) -> str:
    from lsys.checkpoint import CheckpointError

    try:
        states.run(rank, world_size, {}, folder, stop=STOP, load=SAVED)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_without_them_is_refused_by_a_model_that_has_them(gloo: Any, tmp_path: Path) -> None:
    plain = dict(stop=SAVED, save=SAVED, has_state=False)
    gloo(1, run, {}, tmp_path, plain)
    said = gloo(1, refused, tmp_path)[0]
    assert "not loaded" in said and "self_attention" in said
    gloo(1, run, {}, tmp_path, dict(stop=STOP, load=SAVED, has_state=False))  # what declares none loads it as before
