"""Every mixer of the registry is whole: counted, planned, documented, tested against its paper; one that nothing knows is refused everywhere.

What a card says is held against something other than the card: the built module, the ledger, live tensors, torch's FLOP counter. Changing
any one fact of any card turns one of the checks red: test_planted_facts.py.
"""

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from support import parity, published, steps
from support.kept import Watch
from support.spied import TOKENS, mixing_flops, spied_kernels

from lsys.config.rules import check
from lsys.config.schema import Config
from lsys.config.user_code import is_path
from lsys.mixers.card import NORM, MixerCard
from lsys.mixers.exchange import States
from lsys.mixers.registry import CARDS, CHANNEL_CARDS, LETTERS, MIXERS
from lsys.observe.flops import flops_per_token, parameters
from lsys.predict.activations import Activations
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan
from lsys.predict.traffic import StepTraffic
from lsys.predict.weights import chunk_parameters, weights

ROOT = Path(__file__).parents[2]
LINEAR = {"heads": 4, "key_heads": 2, "key_dim": 6}
STATES = [card.name for card in CARDS if card.has_state]


# Each mixer as it is without keys of its own; of those whose keys change what their cards say, a variant too.
OPTIONS: dict[str, dict[str, Any]] = {
    "phased": {"kind": "lightning", "lrpe": "all", "norm": "srms", "decay": False},
    "phased_first": {"kind": "lightning", "lrpe": "first"},
}
KINDS = {name: name for name in MIXERS} | {name: own["kind"] for name, own in OPTIONS.items()}


def changes(name: str, **degrees: int) -> dict[str, Any]:
    """A model of this mixer: of the registry, a variant of `OPTIONS`, or from the path of a card of one's own."""
    axes = {f"parallel__{axis}": degree for axis, degree in degrees.items()}
    mixers = OPTIONS.get(name, {"kind": name} if is_path(name) else None)
    own = {"model__mixers": {called(name): mixers}} if mixers else {}
    return {
        **axes,
        **own,
        "model__pattern": [called(name)],
        "model__layers": 2,
        "model__window": 9,
        "model__linear": LINEAR,
    }


def called(name: str) -> str:
    """What the model calls it."""
    return "mine" if is_path(name) else name


def settings(name: str, **degrees: int) -> Config:
    found: Config = parity.settings(**changes(name, **degrees))
    return found


# ---- planned


@pytest.mark.parametrize("name", MIXERS)
def test_a_run_of_it_is_planned(name: str) -> None:
    check_plan(name)


def check_plan(name: str) -> None:
    """Rules, memory, traffic, rates, times, parameters and FLOPs."""
    config = settings(name, context=2)
    assert not check(config, 2)
    (card,) = config.model.cards.values()
    plan = Plan(config, 2, hardware("h100x2", config.train.precision, cards=[card]))
    assert max(plan.memory) > 0 and plan.traffic()["context"].moved("context") > 0
    assert {f"{way}:{card.symbol}" for way in ("layer", "layer_backward")} <= plan.hardware.costs.keys()
    assert plan.prediction.seconds > 0 and plan.mfu
    assert f"{card.key} mixer" in parameters(config.model)
    assert {f"{card.key} projections", f"{card.key} attention"} <= flops_per_token(config.model, 64).keys()


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
            layout, tokens = SequenceLayout.contiguous((TOKENS,), 1), torch.zeros(TOKENS, dtype=torch.int64)
            with spied_kernels() as spied, FlopCounterMode(display=False) as counter, torch.no_grad():
                model(tokens, tokens, PackedMicroBatch(layout=layout, positions=layout.positions(0)))
            counts = counter.get_flop_counts()["Global"]
            products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    convolution = tuple(layer.conv.weight.shape) if hasattr(layer, "conv") else None
    return {"held": held, "products": products, "spied": spied, "convolution": convolution}


def check_parameters(gloo: Any, name: str) -> None:
    """Names, sizes, marks and gradients of the built mixer, whole and cut in two; products that torch counts."""
    for tensor in (1, 2):
        config = settings(name, tensor=tensor)
        told = {
            parameter.name.removesuffix(".weight"): (parameter.numel, parameter.summed, parameter.is_trained)
            for parameter in chunk_parameters(Deployment(config, tensor, gpu=False), 0, 0)
        }
        for found in gloo(tensor, seen, changes(name, tensor=tensor)):
            built = {key.removesuffix(".weight"): tuple(rest) for key, *rest in found["held"]}
            norms = {weight.name for weight in config.model.cards[called(name)].weights() if weight.kind == NORM}
            assert norms == {key for key in built if "norm" in key}
            assert {key: told.get(key) for key in built} == built
            assert [key for key in told if key in built] == list(built)
            assert not told.keys() - built.keys() - OUTSIDE
            if tensor == 1:
                forward = flops_per_token(config.model, TOKENS)
                expected = TOKENS * sum(v for part, v in forward.items() if not part.endswith("attention"))
                assert found["products"] == expected
                card: Any = config.model.cards[called(name)]
                check_gates(card, found["spied"][-1])
                told_flops, layers = forward[f"{called(name)} attention"], len(found["spied"])
                convolved = layers * 2 * built["conv"][0] if "conv" in built else 0
                assert told_flops * TOKENS == sum(map(mixing_flops, found["spied"])) + TOKENS * convolved
                if card.has_state:
                    convolution = (card.channels, card.conv_width) if card.convolved else None
                    assert found["convolution"] == convolution
                    assert convolution or (card.channels, card.conv_width) == (0, 1)


def check_gates(card: Any, spied: dict[str, Any]) -> None:
    """Family, decay form and delta rule, by what the kernel is given."""
    assert card.has_state == (spied["kernel"] == "linear_attention")
    if not card.has_state:
        assert card.mask == spied["mask"]
        return
    heads, width = spied["v"][1], spied["k"][2]
    log_decay, beta = spied.get("log_decay"), spied.get("beta")
    forms = {"none": None, "head": (heads,), "token": (TOKENS, heads), "channel": (TOKENS, heads, width)}
    assert log_decay == forms[card.decay] and card.delta == (beta is not None)
    assert beta is None or beta == (TOKENS, heads)
    for one in card.exchanges(1):
        if isinstance(one, States):  # where decays are fixed, none and one a head send the same
            assert log_decay == forms[one.decay] and one.delta == (beta is not None)
    of_tokens = [prod(shape) for shape in (log_decay, beta) if shape and shape[0] == TOKENS]
    assert card.gates(1) * TOKENS == sum(of_tokens)


OUTSIDE = {
    "embedding", "input_layernorm", "pre_mlp_layernorm", "linear_fc1", "linear_fc2", "final_layernorm", "output_layer"
}  # fmt: skip


def operations(rank: int, world_size: int, *arguments: Any) -> dict[str, Any]:
    return steps.operations(rank, world_size, *arguments)


def peak(rank: int, world_size: int, *arguments: Any) -> int:
    return steps.peak(rank, world_size, *arguments)


def check_bytes(gloo: Any, name: str) -> None:
    """Every byte of a step on two context ranks, by states or keys and by heads, and on two tensor ranks, as the ledger counts them."""
    ways: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
        ({"context": 2}, {}),
        ({"context": 2}, SENT),
        ({"tensor": 2}, {}),
    )
    for degrees, more in ways:
        changed = changes(name, **degrees) | more
        config = parity.settings(**changed)
        for rank, found in enumerate(gloo(2, operations, changed)):
            steps.check_told(config, rank, found, replica=rank if "context" in degrees else 0)


# Little beside the mixers, so that a part of what they keep shows in the peak.
NARROW = dict(
    model__hidden=128, model__heads=4, model__head_dim=32, model__groups=2, model__ffn=16, model__vocab=8, model__linear={},
    model__window=64, train__micro_batch_tokens=1024, train__batch_tokens=1024,
)  # fmt: skip
CP2, BF16 = {"parallel__context": 2}, {"train__precision": "bf16"}
SENT = {"parallel__linear": "ulysses", "parallel__attention": "ulysses"}


# Heads that share keys, more than one group on each of two ranks. Where heads are sent, the exchange keeps buffers for a time of its own:
# there peaks are compared.
KEPT = dict(
    model__layers=2, model__hidden=64, model__heads=8, model__head_dim=16, model__groups=4, model__ffn=16, model__vocab=8,
    model__linear={"heads": 8, "key_heads": 4, "key_dim": 12, "head_dim": 20},
)  # fmt: skip
LENGTHS = 256, 512
PLACES: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}), (1, BF16), (2, {"parallel__tensor": 2})
)  # fmt: skip


def kept(rank: int, world_size: int, changed: dict[str, Any]) -> list[dict[str, int]]:
    """What each of one rank's layers keeps, by moment, for each token by which a micro-batch is longer."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    found = []
    for tokens in LENGTHS:
        config = parity.settings(**changed, train__micro_batch_tokens=tokens, train__batch_tokens=tokens)
        parallel = config.parallel
        with process_groups(parallel, Launch(rank=rank, world_size=world_size)) as groups:
            stream: Any = steps.SameDocuments(config.model.vocab, (tokens,))
            planner = Planner(stream, tokens, tokens, parallel.context, parallel.tensor, parallel.layout)
            plan = planner.step(0, groups.data_rank, groups.data_size)
            batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
            layers = Watch(Engine(config, groups)).run(batches)
            found.append([layers[number] for number in sorted(layers)])
    return [{moment: many[moment] - few[moment] for moment in few} for few, many in zip(*found, strict=True)]


def told_kept(ranks: int, stage: int, changed: dict[str, Any]) -> dict[int, dict[str, float]]:
    """As `kept`, what is told of the last layer of a stage, and of its first where the card says that it is not as the others."""
    told: dict[int, dict[str, float]] = {}
    for tokens, sign in zip(LENGTHS, (-1, 1), strict=True):
        config = parity.settings(**changed, train__micro_batch_tokens=tokens, train__batch_tokens=tokens)
        activations = Activations(Deployment(config, ranks, gpu=False))
        kinds, norm = activations.deployment.kinds(stage), activations.slots / activations.tensor * activations.norm(64)
        for number, kind in enumerate(kinds):
            if kind.is_first or number == len(kinds) - 1:
                layer = activations.layers[kind]
                gathered = (
                    activations._gathered if kind.is_first else 0.0
                )  # Megatron's buffer, which the first layer makes
                needed = layer.projected + layer.before + layer.entry - norm + gathered
                tables = activations._tables(kinds[: number + 1])
                sizes = {"kernel": needed, "forward": needed + layer.after + layer.mixed, "tables": tables}
                before = told.get(number, {})
                told[number] = {moment: before.get(moment, 0.0) + sign * size for moment, size in sizes.items()}
    return told


def check_kept(gloo: Any, name: str) -> None:
    """What autograd keeps, to the byte: after the forward pass, and of that what lives when the kernel's backward pass begins."""
    (card,) = settings(name).model.cards.values()
    places = (*PLACES, (2, {"parallel__pipeline": 2})) if card.is_first_apart else PLACES
    for ranks, more in places:
        changed = changes(name) | KEPT | more
        for rank, found in enumerate(gloo(ranks, kept, changed)):
            told = told_kept(ranks, rank if "parallel__pipeline" in more else 0, changed)
            assert told == {number: found[number] for number in told}, more


def check_memory(gloo: Any, name: str) -> None:
    """Peaks of live tensors, to 10%, and what each further layer adds to them, which is what autograd keeps of it, to 1%.

    Of one rank in fp32, across ranks in bf16, and with heads sent to other ranks.
    """
    for ranks, more in ((1, {}), (2, CP2 | BF16), (2, CP2 | SENT)):
        told, found = [], []
        for layers in (4, 8):
            changed = changes(name) | NARROW | more | {"model__layers": layers}
            config = parity.settings(**changed)
            told.append(Activations(Deployment(config, ranks, gpu=False)).peak(0).total)
            found.append(gloo(ranks, peak, changed, (config.train.micro_batch_tokens,)))
        for few, many in zip(*found, strict=True):
            assert told[1] == pytest.approx(many, rel=0.10), told[1] / many - 1
            assert told[1] - told[0] == pytest.approx(many - few, rel=0.01), (told[1] - told[0]) / (many - few) - 1


@pytest.mark.parametrize("name", KINDS)
def test_its_parameters_and_products_are_those_of_the_built_module(measured: Any, name: str) -> None:
    check_parameters(measured, name)


@pytest.mark.parametrize("name", KINDS)
def test_its_bytes_are_exact(measured: Any, name: str) -> None:
    check_bytes(measured, name)


@pytest.mark.parametrize("name", KINDS)
def test_what_autograd_keeps_of_it_is_exact(measured: Any, name: str) -> None:
    check_kept(measured, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_its_peak_memory_is_known(measured: Any, name: str) -> None:
    check_memory(measured, name)


# ---- documented, tested


def test_each_has_its_definition_and_its_place_in_the_parity_matrix() -> None:
    from model.test_mixers import CASES

    assert {*published.LAYERS} == {*STATES}
    assert {name for name, _ in CASES.values()} == {*STATES}


def test_each_has_a_documented_row() -> None:
    check_rows((ROOT / "docs" / "concepts.md").read_text(), (*CARDS, *CHANNEL_CARDS))


def check_rows(page: str, cards: Iterable[type[MixerCard]]) -> None:
    """A row for each, in their order: letter, if it has one, and name."""
    rows = re.findall(r"^\| (?:`(\S)`, )?`(\w+)` \|", page, re.M)
    assert rows == [(card.letter, card.name) for card in cards]


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
            lambda: weights(Deployment(config, 1), 0),
            lambda: Activations(Deployment(config, 1)).peak(0),
            lambda: StepTraffic(Deployment(config, 1)).bytes(0),
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
