"""Every channel mixer of the registry is whole, as every token mixer: told against what is built, sent and alive.

A dense MLP is taken with each of its activations.
"""

from typing import Any, get_args

import pytest
from support import kept as live
from support import parity, steps

from lsys.config.rules import check
from lsys.config.schema import Config
from lsys.mixers.card import NORM, PRODUCT, VECTOR, Place
from lsys.mixers.dense import Dense, DenseOptions
from lsys.mixers.registry import CHANNEL_CARDS, CHANNEL_LETTERS, CHANNELS
from lsys.observe.flops import flops_per_token, parameters
from lsys.predict.activations import Activations
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan
from lsys.predict.traffic import StepTraffic
from lsys.predict.weights import chunk_parameters, weights

TOKENS = 64
ACTIVATIONS = get_args(DenseOptions.model_fields["activation"].annotation)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("dense", {"activation": name}) for name in ACTIVATIONS},
    **{name: (name, {}) for name in CHANNELS if name != "dense"},
}


def changes(kind: str, **degrees: int) -> dict[str, Any]:
    """A model with one token mixer, a variant of the channel mixer in every layer."""
    name, options = KINDS[kind]
    axes = {f"parallel__{axis}": degree for axis, degree in degrees.items()}
    mixers = {"own": {"kind": name, **options}}
    return {**axes, "model__pattern": "L", "model__layers": 2, "model__channels": ["own"], "model__mixers": mixers}


def settings(kind: str, **degrees: int) -> Config:
    found: Config = parity.settings(**changes(kind, **degrees))
    return found


def test_every_channel_mixer_is_here() -> None:
    assert {name for name, _ in KINDS.values()} == {*CHANNELS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_it_is_planned(kind: str) -> None:
    config = settings(kind, context=2)
    assert not check(config, 2)
    plan = Plan(config, 2, hardware("h100x2", config.train.precision))
    assert max(plan.memory) > 0 and plan.prediction.seconds > 0 and plan.mfu
    [card] = config.model.channel_cards.values()
    told = {card.row} if card.products else set()
    assert told == {row for row in parameters(config.model) if row.startswith("own")}
    assert told == {row for row in flops_per_token(config.model, 64) if row.startswith("own")}


# ---- held against what is built and run


def seen(rank: int, world_size: int, changed: dict[str, Any]) -> dict[str, Any]:
    """What is built: parameters of a layer outside its token mixer; products of the whole model, counted by torch."""
    from lsys.runtime import install_megatron

    install_megatron()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lsys.model.packed import PackedMicroBatch
    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config, products = parity.settings(**changed), 0
    with process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        model: Any = Engine(config, groups).chunks[0].module
        held = [
            (name, p.numel(), bool(getattr(p, "sequence_parallel", False)), p.requires_grad)
            for name, p in model.decoder.layers[0].named_parameters()
            if not name.startswith("self_attention.")
        ]
        own = getattr(model.decoder.layers[0], "mlp", torch.nn.Module()).named_parameters()
        kinds = [(name, NORM if "norm" in name else PRODUCT if p.dim() == 2 else VECTOR) for name, p in own]
        if world_size == 1:
            layout, tokens = SequenceLayout.contiguous((TOKENS,), 1), torch.zeros(TOKENS, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(tokens, tokens, PackedMicroBatch(layout=layout, positions=layout.positions(0)))
            counts = counter.get_flop_counts()["Global"]
            products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return {
        "held": held,
        "kinds": kinds,
        "products": products,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def check_parameters(gloo: Any, kind: str) -> None:
    """Names, sizes, marks and gradients of what is built, whole and cut in two; products that torch counts."""
    for tensor in (1, 2):
        config = settings(kind, tensor=tensor)
        mixer = {weight.name for weight in config.model.cards["lightning"].weights()} | {"in_proj", "out_proj"}
        told = [
            (p.name.removesuffix(".weight"), p.numel, p.summed, p.is_trained)
            for p in chunk_parameters(Deployment(config, tensor, gpu=False), 0, 0)
            if p.name not in mixer | {"embedding", "output_layer", "final_layernorm"}
        ]
        for found in gloo(tensor, seen, changes(kind, tensor=tensor)):
            built = [(name.removeprefix("mlp.").removesuffix(".weight"), *rest) for name, *rest in found["held"]]
            assert told == 2 * built
            [card] = config.model.channel_cards.values()
            kinds = [(name.removesuffix(".weight"), kind) for name, kind in found["kinds"]]
            assert [(weight.name.removesuffix(".weight"), weight.kind) for weight in card.weights()] == kinds
            if tensor == 1:
                forward = flops_per_token(config.model, TOKENS)
                expected = TOKENS * sum(v for part, v in forward.items() if not part.endswith("attention"))
                assert found["products"] == expected
                assert found["parameters"] == sum(parameters(config.model).values())


def operations(rank: int, world_size: int, *arguments: Any) -> dict[str, Any]:
    return steps.operations(rank, world_size, *arguments)


def peak(rank: int, world_size: int, *arguments: Any) -> int:
    return steps.peak(rank, world_size, *arguments)


def check_bytes(gloo: Any, kind: str) -> None:
    """Every byte of a step on two context and on two tensor ranks, as the ledger counts them; parameters and optimizer states."""
    for degrees in ({"context": 2}, {"tensor": 2}):
        changed = changes(kind, **degrees)
        config = parity.settings(**changed)
        for rank, found in enumerate(gloo(2, operations, changed)):
            steps.check_told(config, rank, found, replica=rank if "context" in degrees else 0)


LENGTHS = 256, 512


def kept(rank: int, world_size: int, changed: dict[str, Any]) -> dict[bool, tuple[bool, list[float]]]:
    """Whether the module takes a fused kernel, and the bytes a token of `live.channel_bytes`: as it is on CPUs, and as on GPUs.

    Megatron's fused kernel is a torch function that does its own backward pass, which CPUs run too: what it keeps is the same there.
    """
    from dataclasses import replace

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.mixers.registry import module_class
    from lsys.model.megatron_config import transformer_config
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    config, results = parity.settings(**changed), {}
    [card] = config.model.channel_cards.values()
    with process_groups(config.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        for gpu in (False, True):
            own = replace(transformer_config(config), bias_activation_fusion=gpu)
            sizes, fuses = [(0, 0)] * 2, False
            if card.module:
                module = module_class(card)(config=own, layer_number=1, pg_collection=groups.collection, card=card)
                sizes = [live.channel_bytes(module, tokens, config.model.hidden) for tokens in LENGTHS]
                fuses = bool(module.config.bias_activation_fusion)
            results[gpu] = fuses, [(b - a) / (LENGTHS[1] - LENGTHS[0]) for a, b in zip(*sizes, strict=True)]
    return results


def check_kept(gloo: Any, kind: str) -> None:
    """What autograd keeps, to the byte, and the peak of the backward pass; of fused kernels only the former, whose peak GPUs have."""
    for precision, itemsize in (("fp32", 4), ("bf16", 2)):
        changed = changes(kind) | {"train__precision": precision}
        [card] = parity.settings(**changed).model.channel_cards.values()
        [found] = gloo(1, kept, changed)
        for gpu, (fuses, (left, most)) in found.items():
            place = Place(itemsize=itemsize, gpu=gpu, tensor=1, is_sent=False)
            assert card.kept(place) == left
            assert gpu or card.kept(place) + card.workspace(place) == most
            assert not isinstance(card, Dense) or fuses == (gpu and card.activation.fused is not None)


# Much of it beside the token mixers, so that a part of what it keeps shows in the peak.
WIDE = dict(
    model__layers=8, model__hidden=32, model__heads=2, model__head_dim=16, model__groups=2, model__vocab=8, model__ffn=1024,
    train__micro_batch_tokens=1024, train__batch_tokens=1024,
)  # fmt: skip
MORE: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (1, {"train__recompute": "full"}),
    (2, {"parallel__tensor": 2, "train__precision": "bf16"}),
)


def check_memory(gloo: Any, kind: str) -> None:
    """The peak of live tensors, to 10%."""
    for ranks, more in MORE:
        changed = changes(kind) | WIDE | more
        config = parity.settings(**changed)
        told = Activations(Deployment(config, ranks, gpu=False)).peak(0).total
        for found in gloo(ranks, peak, changed, (config.train.micro_batch_tokens,)):
            assert told == pytest.approx(found, rel=0.10), (told / found - 1, more)


@pytest.mark.parametrize("kind", KINDS)
def test_its_parameters_and_products_are_those_of_the_built_module(gloo: Any, kind: str) -> None:
    check_parameters(gloo, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_its_bytes_are_exact(gloo: Any, kind: str) -> None:
    check_bytes(gloo, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_autograd_keeps_of_it_is_exact(gloo: Any, kind: str) -> None:
    check_kept(gloo, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_peak_memory_is_known(gloo: Any, kind: str) -> None:
    check_memory(gloo, kind)


# ---- documented, tested, refused


def test_each_has_its_definition() -> None:
    from model.test_channels import ACTIVATIONS as defined

    assert {*defined} == {*ACTIVATIONS}
    assert len(CHANNEL_LETTERS) == len([card for card in CHANNEL_CARDS if card.letter])
    assert len(CHANNELS) == len(CHANNEL_CARDS)
    for card in CHANNEL_CARDS:
        assert card.__module__ == f"lsys.mixers.{card.name}"


def test_one_that_nothing_knows_is_refused_everywhere() -> None:
    for channels in ("FX", ["dense", "unheard_of"], "L", ["lightning"]):
        config = parity.settings(model__channels=channels)
        assert any(mistake.key == "model.channels" for mistake in check(config, 1))
        for refuses in (
            lambda: parameters(config.model),
            lambda: flops_per_token(config.model, 8),
            lambda: weights(Deployment(config, 1), 0),
            lambda: Activations(Deployment(config, 1)).peak(0),
            lambda: StepTraffic(Deployment(config, 1)).bytes(0),
            lambda: Plan(config, 1, hardware("h100x8", "fp32")).prediction,
        ):
            with pytest.raises(KeyError, match="no channel mixer is called"):
                refuses()


def test_a_channel_mixer_is_no_token_mixer() -> None:
    config = parity.settings(model__pattern=["dense", "lightning"])
    assert [mistake.key for mistake in check(config, 1)] == ["model.pattern"]
