"""Every combination of degrees equals one process: gradients, norms and losses. And the comparison notices planted faults."""

from typing import Any

import pytest
from support import faults, parity
from support.comparing import largest

TOLERANCE = 1e-5  # fp32, relative


def outcome(rank: int, world_size: int, changes: dict[str, Any], *more: Any) -> Any:
    return parity.train(rank, world_size, changes, *more).__dict__


def differences(gloo: Any, ranks: int, changes: dict[str, Any], *more: Any) -> dict[str, float]:
    shared = {key: value for key, value in changes.items() if not key.startswith("parallel__")}
    one = _reference(gloo, tuple(sorted(shared.items())))
    many = [parity.Outcome(**each) for each in gloo(ranks, outcome, changes, *more)]
    return parity.difference(one, many)


_references: dict[str, Any] = {}


def _reference(gloo: Any, shared: tuple) -> Any:
    key = repr(shared)
    if key not in _references:
        _references[key] = [parity.Outcome(**each) for each in gloo(1, outcome, dict(shared))]
    return _references[key]


def degrees(tensor: int = 1, pipeline: int = 1, virtual: int = 1, context: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "parallel__tensor": tensor,
        "parallel__pipeline": pipeline,
        "parallel__virtual_pipeline": virtual,
        "parallel__context": context,
        **more,
    }


FAST = {
    "TP2": (2, degrees(tensor=2)),
    "PP2": (2, degrees(pipeline=2)),
    "PP2xVPP2": (2, degrees(pipeline=2, virtual=2)),
    "CP2 zigzag": (2, degrees(context=2)),
    "CP2 contiguous": (2, degrees(context=2, parallel__layout="contiguous")),
    "DP2": (2, {}),
    "TP2xCP2": (4, degrees(tensor=2, context=2)),
}
SLOW = {
    "TP2xPP2": (4, degrees(tensor=2, pipeline=2)),
    "PP2xCP2xDP2": (8, degrees(pipeline=2, context=2)),
    "TP2xPP2xCP2": (8, degrees(tensor=2, pipeline=2, context=2)),
    "CP3": (3, degrees(context=3)),
    "CP4 contiguous": (4, degrees(context=4, parallel__layout="contiguous")),
    "PP4": (4, degrees(pipeline=4)),
    "DP4": (4, {}),
    "DP2 plain optimizer": (2, {"optimizer__distributed": False}),
    "PP2 untied": (2, degrees(pipeline=2, model__tied=False)),
    "TP2 overlap": (4, degrees(tensor=2, train__overlap=True)),
    "DP2 overlap": (2, {"train__overlap": True}),
    "TP2xCP2 selective recompute": (4, degrees(tensor=2, context=2, train__recompute="selective")),
    "PP2xCP2 full recompute": (4, degrees(pipeline=2, context=2, train__recompute="full")),
    "CP2 only softmax": (2, degrees(context=2, model__pattern="S")),
    "TP2xCP2 window": (4, degrees(tensor=2, context=2, model__pattern="LW", model__window=9)),
    "CP3 window": (3, degrees(context=3, model__pattern="WS", model__window=50)),
    "CP2 no decay": (2, degrees(context=2, model__pattern="L", model__linear={"decay": False})),
}
# Layers with a state. Value heads share keys, so that groups are cut too.
LINEAR = {"heads": 4, "key_heads": 2, "key_dim": 6}
FAMILY = {
    "LS TP2xCP2": (4, degrees(tensor=2, context=2, model__pattern="LS", model__linear={"lrpe": "all", "norm": "srms"})),
    "GS TP2xCP2": (4, degrees(tensor=2, context=2, model__pattern="GS", model__linear={"gate_rank": 3})),
    "MMMS TP2xCP2": (4, degrees(tensor=2, context=2, model__pattern="MMMS", model__linear=LINEAR)),
    "DDDS TP2xCP2": (4, degrees(tensor=2, context=2, model__pattern="DDDS", model__linear=LINEAR)),
    "NS TP2xCP2": (4, degrees(tensor=2, context=2, model__pattern="NS", model__linear=LINEAR)),
    "KKKS TP2xCP2": (4, degrees(tensor=2, context=2, model__pattern="KKKS", model__linear=LINEAR)),
    "RGMD PP2xVPP2": (2, degrees(pipeline=2, virtual=2, model__pattern="RGMD", model__linear=LINEAR)),
}
# Every channel mixer in one model, the dense one with each activation, of widths that differ.
CHANNELS: dict[str, Any] = {
    "model__pattern": "LMS",
    "model__layers": 6,
    "model__channels": ["dense", "geglu", "none", "sglu", "relu2", "starrelu"],
    "model__mixers": {
        name: {"kind": "dense", "activation": name, "width": 8 * (4 + number)}
        for number, name in enumerate(("geglu", "sglu", "relu2", "starrelu"))
    },
}
CHANNELS_FAST = {"TP2xCP2": (4, degrees(tensor=2, context=2)), "PP2": (2, degrees(pipeline=2))}
CHANNELS_SLOW = {
    "TP2xPP2xCP2": (8, degrees(tensor=2, pipeline=2, context=2)),
    "PP3xVPP2": (3, degrees(pipeline=3, virtual=2, train__batch_tokens=3 * 97)),
    "TP2xCP2 selective recompute": (4, degrees(tensor=2, context=2, train__recompute="selective")),
    "TP2xDP2 full recompute": (4, degrees(tensor=2, train__recompute="full")),
    "CP3": (3, degrees(context=3)),
}
FAMILY_DEGREES: list[tuple[str, int, dict[str, Any]]] = [
    ("TP2", 2, dict(tensor=2)),
    ("PP2", 2, dict(pipeline=2)),
    ("CP3", 3, dict(context=3)),
    ("CP4 contiguous", 4, dict(context=4, parallel__layout="contiguous")),
    ("TP2xPP2xCP2", 8, dict(tensor=2, pipeline=2, context=2)),
    ("TP2xCP2 selective recompute", 4, dict(tensor=2, context=2, train__recompute="selective")),
    ("CP2xDP2 full recompute", 4, dict(context=2, train__recompute="full")),
]
FAMILY_SLOW = {
    f"{pattern} {name}": (ranks, degrees(model__pattern=pattern, model__linear=LINEAR, **axes))
    for pattern in ("LS", "GS", "MMMS", "DDDS", "NS", "KS", "RGMD")
    for name, ranks, axes in FAMILY_DEGREES
}


METHODS = {
    "CP2": (2, degrees(context=2)),
    "CP3 window": (3, degrees(context=3, model__pattern="WS", model__window=50)),
    "TP2xCP2 contiguous": (4, degrees(tensor=2, context=2, parallel__layout="contiguous")),
    "CP4 selective recompute": (4, degrees(context=4, train__recompute="selective")),
    "PP2xCP2xDP2": (8, degrees(pipeline=2, context=2)),
}


def check(measured: dict[str, float]) -> None:
    assert largest(measured.values()) <= TOLERANCE, measured


@pytest.mark.parametrize("case", FAST)
def test_equals_one_process(gloo: Any, case: str) -> None:
    check(differences(gloo, *FAST[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_equals_one_process_more(gloo: Any, case: str) -> None:
    check(differences(gloo, *SLOW[case]))


@pytest.mark.parametrize("case", FAMILY)
def test_layers_with_a_state_equal_one_process(gloo: Any, case: str) -> None:
    check(differences(gloo, *FAMILY[case]))


@pytest.mark.parametrize("case", CHANNELS_FAST)
def test_channel_mixers_equal_one_process(gloo: Any, case: str) -> None:
    ranks, changes = CHANNELS_FAST[case]
    check(differences(gloo, ranks, CHANNELS | changes))


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANNELS_SLOW)
def test_channel_mixers_equal_one_process_more(gloo: Any, case: str) -> None:
    ranks, changes = CHANNELS_SLOW[case]
    check(differences(gloo, ranks, CHANNELS | changes))


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILY_SLOW)
def test_layers_with_a_state_equal_one_process_more(gloo: Any, case: str) -> None:
    check(differences(gloo, *FAMILY_SLOW[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("method", ["ring", "gather", "ulysses", "usp"])
def test_each_way_of_attention_equals_one_process(gloo: Any, method: str, case: str) -> None:
    ranks, changes = METHODS[case]
    more = None, 2  # no fault, two ranks on each node
    check(differences(gloo, ranks, changes | {"parallel__attention": method}, *more))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["GS TP2xCP2", "MMMS TP2xCP2", "DDDS TP2xCP2", "KKKS TP2xCP2", "KS CP2", "LS CP3", "RGMD CP4"]
)
@pytest.mark.parametrize("method", ["lasp1", "zeco", "ulysses"])
def test_each_way_of_states_equals_one_process(gloo: Any, method: str, case: str) -> None:
    pattern, axes = case.split()
    ranks, changes = FAMILY.get(case) or (int(axes[2]), degrees(context=int(axes[2]), model__pattern=pattern))
    check(differences(gloo, ranks, changes | {"parallel__linear": method}))


# Two heads, of which ranks of the context group have one or none.
FEW_HEADS = {
    f"{pattern} {name}": (
        4,
        degrees(**axes, model__pattern=pattern, model__linear={"heads": 2, "key_heads": keys, "key_dim": 6}),
    )
    for pattern, keys in {"LS": 2, "GS": 2, "MMMS": 2, "DDDS": 2, "NS": 1, "KS": 2}.items()
    for name, axes in {"TP2xCP2": {"tensor": 2, "context": 2}, "CP4": {"context": 4}}.items()
    if name == "CP4" or keys > 1
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FEW_HEADS)
def test_ranks_without_a_head_equal_one_process(gloo: Any, case: str) -> None:
    ranks, changes = FEW_HEADS[case]
    check(differences(gloo, ranks, changes | {"parallel__linear": "ulysses"}))


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_planted_fault_is_noticed(gloo: Any, fault: str) -> None:
    ranks, changes = faults.FAULTS[fault].ranks, faults.FAULTS[fault].changes
    measured = differences(gloo, ranks, changes, fault)
    assert not largest(measured.values()) <= 100 * TOLERANCE, measured
