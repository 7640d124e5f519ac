"""Every mixer of the registry is whole: counted, planned, documented, tested against its paper; one that nothing knows is refused everywhere.

What a card says is held against something other than the card: the built module, the ledger, live tensors, torch's FLOP counter. Changing
any one fact of any card turns a test red; `FACTS` plants such changes.
"""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import parity, published, steps

from lsys.config.rules import check
from lsys.config.schema import Config
from lsys.mixers.card import NORM
from lsys.mixers.registry import CARDS, CHANNEL_CARDS, LETTERS, MIXERS
from lsys.observe.flops import flops_per_token, parameters
from lsys.predict.activations import Activations
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan
from lsys.predict.shape import Shape
from lsys.predict.traffic import StepTraffic
from lsys.predict.weights import chunk_parameters, weights

ROOT = Path(__file__).parents[2]
LINEAR = {"heads": 4, "key_heads": 2, "key_dim": 6}
STATES = [card.name for card in CARDS if card.has_state]


def changes(name: str, **degrees: int) -> dict[str, Any]:
    axes = {f"parallel__{axis}": degree for axis, degree in degrees.items()}
    return {**axes, "model__pattern": [name], "model__layers": 2, "model__window": 9, "model__linear": LINEAR}


def settings(name: str, **degrees: int) -> Config:
    found: Config = parity.settings(**changes(name, **degrees))
    return found


# ---- planned


@pytest.mark.parametrize("name", MIXERS)
def test_a_run_of_it_is_planned(name: str) -> None:
    config = settings(name, context=2)
    assert not check(config, 2)
    plan = Plan(config, 2, hardware("h100x2", config.train.precision))
    assert max(plan.memory) > 0 and plan.traffic()["context"].moved("context") > 0
    symbol = MIXERS[name].symbol
    assert {f"{way}:{symbol}" for way in ("layer", "layer_backward")} <= plan.hardware.costs.keys()
    assert plan.prediction.seconds > 0 and plan.mfu
    assert f"{name} mixer" in parameters(config.model)
    assert {f"{name} projections", f"{name} attention"} <= flops_per_token(config.model, 64).keys()


# ---- held against what is built and run


def seen(rank: int, world_size: int, changed: dict[str, Any]) -> dict[str, Any]:
    """What one rank's engine is and does: its parameters, products outside mixers, bytes, the peak of live tensors."""
    from lsys.runtime import install_megatron

    install_megatron()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lsys.model.packed import PackedMicroBatch
    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = parity.settings(**changed)
    products, spied = 0, []
    with process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        model: Any = Engine(config, groups).chunks[0].module
        layer = model.decoder.layers[0].self_attention
        held = [
            (name, p.numel(), bool(getattr(p, "sequence_parallel", False)), p.requires_grad)
            for name, p in layer.named_parameters()
        ]
        if world_size == 1:
            spied = spy(layer)
            layout, tokens = SequenceLayout.contiguous((TOKENS,), 1), torch.zeros(TOKENS, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(tokens, tokens, PackedMicroBatch(layout=layout, positions=layout.positions(0)))
            counts = counter.get_flop_counts()["Global"]
            products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return {"held": held, "products": products, "spied": spied}


def spy(layer: Any) -> list[Any]:
    """What the kernel of a state mixer is given: the shapes of log-decay and beta, filled when the layer runs."""
    found: list[Any] = []
    if hasattr(layer, "attend"):
        attend = layer.attend

        def watched(q: Any, k: Any, v: Any, packed: Any, **options: Any) -> Any:
            found.extend(
                None if options.get(key) is None else tuple(options[key].shape) for key in ("log_decay", "beta")
            )
            return attend(q, k, v, packed, **options)

        layer.attend = watched
    return found


TOKENS = 64


def check_parameters(gloo: Any, name: str) -> None:
    """Names, sizes, marks and gradients of the built mixer, whole and cut in two; products that torch counts."""
    for tensor in (1, 2):
        config = settings(name, tensor=tensor)
        told = {
            parameter.name.removesuffix(".weight"): (parameter.numbers, parameter.summed, parameter.is_trained)
            for parameter in chunk_parameters(Shape(config, tensor, gpu=False), 0, 0)
        }
        for found in gloo(tensor, seen, changes(name, tensor=tensor)):
            built = {key.removesuffix(".weight"): tuple(rest) for key, *rest in found["held"]}
            norms = {weight.name for weight in config.model.cards[name].weights() if weight.kind == NORM}
            assert norms == {key for key in built if "norm" in key}
            assert {key: told.get(key) for key in built} == built
            assert not told.keys() - built.keys() - OUTSIDE
            if tensor == 1:
                forward = flops_per_token(config.model, TOKENS)
                expected = TOKENS * sum(v for part, v in forward.items() if not part.endswith("attention"))
                assert found["products"] == expected
                check_gates(config, name, found["spied"])
                card: Any = config.model.cards[name]
                convolution = card.channels * card.conv_width if card.has_state and card.convolved else None
                assert built.get("conv", (None,))[0] == convolution


def check_gates(config: Config, name: str, spied: list[Any]) -> None:
    """Decay form and delta rule, by the shapes that the kernel is given."""
    card: Any = config.model.cards[name]
    if not card.has_state:
        return
    log_decay, beta = spied
    sizes = {
        "none": None,
        "head": (card.heads,),
        "token": (TOKENS, card.heads),
        "channel": (TOKENS, card.heads, card.key_width),
    }
    assert log_decay == sizes[card.decay] and card.delta == (beta is not None)
    assert beta is None or beta == (TOKENS, card.heads)


OUTSIDE = {
    "embedding", "input_layernorm", "pre_mlp_layernorm", "linear_fc1", "linear_fc2", "final_layernorm", "output_layer"
}  # fmt: skip


def operations(rank: int, world_size: int, *arguments: Any) -> dict[str, Any]:
    return steps.operations(rank, world_size, *arguments)


def peak(rank: int, world_size: int, *arguments: Any) -> int:
    return steps.peak(rank, world_size, *arguments)


def check_bytes(gloo: Any, name: str, method: str = "auto") -> None:
    """Every byte of a step on two context and on two tensor ranks, as the ledger counts them."""
    for degrees in ({"context": 2}, {"tensor": 2}):
        changed = changes(name, **degrees)
        config = parity.settings(**changed)
        for rank, found in enumerate(gloo(2, operations, changed)):
            told: Counter[Any] = Counter()
            for lengths in found["lengths"]:
                shape = Shape(config, 2, gpu=False, lengths=lengths)
                for key, size in StepTraffic(shape).bytes(rank).items():
                    if key[0] == "context":
                        told[key] += size // shape.micro_batches
                    elif key[0] != "world":
                        told[key] = size
            assert dict(told) == {key: size for key, size in found["bytes"].items() if size}
            held = weights(Shape(config, 2, gpu=False), 0, rank if "context" in degrees else 0)
            assert found["tensors"] == {key: getattr(held, key) for key in ("parameters", "gradients", "optimizer")}


# Little beside the mixers, so that a part of what they keep shows in the peak.
NARROW = dict(
    model__hidden=128, model__heads=4, model__head_dim=32, model__groups=2, model__ffn=16, model__vocab=8, model__linear={},
    model__window=64, train__micro_batch_tokens=1024, train__batch_tokens=1024,
)  # fmt: skip
CP2, BF16 = {"parallel__context": 2}, {"train__precision": "bf16"}
SENT = {"parallel__linear": "ulysses", "parallel__attention": "ulysses"}


def check_memory(gloo: Any, name: str) -> None:
    """Peaks of live tensors, to 10%, and what each further layer adds to them, which is what autograd keeps of it, to 1%.

    Of one rank in fp32, across ranks in bf16, and with heads sent to other ranks.
    """
    for ranks, more in ((1, {}), (2, CP2 | BF16), (2, CP2 | SENT)):
        told, found = [], []
        for layers in (4, 8):
            changed = changes(name) | NARROW | more | {"model__layers": layers}
            config = parity.settings(**changed)
            told.append(Activations(Shape(config, ranks, gpu=False)).peak(0).total)
            found.append(gloo(ranks, peak, changed, (config.train.micro_batch_tokens,)))
        for few, many in zip(*found, strict=True):
            assert told[1] == pytest.approx(many, rel=0.10), told[1] / many - 1
            assert told[1] - told[0] == pytest.approx(many - few, rel=0.01), (told[1] - told[0]) / (many - few) - 1


@pytest.mark.parametrize("name", MIXERS)
def test_its_parameters_and_products_are_those_of_the_built_module(gloo: Any, name: str) -> None:
    check_parameters(gloo, name)


@pytest.mark.parametrize("name", MIXERS)
def test_its_bytes_are_exact(gloo: Any, name: str) -> None:
    check_bytes(gloo, name)


@pytest.mark.parametrize("name", MIXERS)
def test_its_peak_memory_is_known(gloo: Any, name: str) -> None:
    check_memory(gloo, name)


# ---- documented, tested


def test_each_has_its_definition_and_its_place_in_the_parity_matrix() -> None:
    from model.test_mixers import CASES

    assert {*published.LAYERS} == {*STATES}
    assert {LETTERS[letter] for letter, _ in CASES.values()} == {*STATES}


def test_each_has_a_documented_row() -> None:
    rows = re.findall(r"^\| `(\S)`, `(\w+)` \|", (ROOT / "docs" / "concepts.md").read_text(), re.M)
    assert rows == [(card.letter, card.name) for card in (*CARDS, *CHANNEL_CARDS) if card.letter]


def test_letters_and_names_are_of_one_mixer_each() -> None:
    assert len(LETTERS) == len([card for card in CARDS if card.letter]) and len(MIXERS) == len(CARDS)
    for card in CARDS:
        assert card.__module__ == f"lsys.mixers.{card.name}" and card.module.startswith(
            f"lsys.model.mixers.{card.name}:"
        )


# ---- refused


def test_one_that_nothing_knows_is_refused_everywhere() -> None:
    for pattern in ("LQ", ["lightning", "unheard_of"]):
        config = parity.settings(model__pattern=pattern)
        assert any(mistake.key == "model.pattern" for mistake in check(config, 1))
        for refuses in (
            lambda: parameters(config.model),
            lambda: flops_per_token(config.model, 8),
            lambda: weights(Shape(config, 1), 0),
            lambda: Activations(Shape(config, 1)).peak(0),
            lambda: StepTraffic(Shape(config, 1)).bytes(0),
            lambda: Plan(config, 1, hardware("h100x8", "fp32")).prediction,
        ):
            with pytest.raises(KeyError, match="no token mixer is called"):
                refuses()


def test_a_calibration_without_rates_for_a_mixer_is_refused(capsys: pytest.CaptureFixture) -> None:
    """One that is older than the mixer would take its layers' time for none."""
    from lsys.cli import main

    words = ["check", str(ROOT / "configs" / "quickstart.yaml"), "--world-size", "2", "--model.pattern", "NLLS"]
    assert main([*words, "--hardware", str(ROOT / "tests" / "baseline" / "calibration.json")]) == 2
    assert "has no rates for delta_net layers; bench/predict.py makes" in capsys.readouterr().err


# ---- nothing decides by a letter, a name or a card


def test_nothing_but_cards_modules_and_tests_knows_a_mixer() -> None:
    """String constants that are a mixer's letter or name, and imports of single cards, outside the registry."""
    names = {*MIXERS, *(card.letter for card in CARDS)} - {""}
    found = []
    allowed = ("lsys/mixers/", "lsys/model/mixers/", *ALLOWED)
    for path in (p for folder in ("lsys", "parallel", "launch") for p in (ROOT / folder).rglob("*.py")):
        where = str(path.relative_to(ROOT))
        if where.startswith(allowed):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                found.append(f"{where}:{node.lineno} {node.value!r}")
            if isinstance(node, ast.ImportFrom) and node.module in {f"lsys.mixers.{name}" for name in MIXERS}:
                found.append(f"{where}:{node.lineno} imports a card")
    assert not found, "\n".join(found)


# Old keys, by the names of the mixers that they went to; a kind of events in traces.
ALLOWED = ("lsys/config/mixers.py", "lsys/observe/profiler.py")
