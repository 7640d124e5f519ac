"""A layer is its definition: norms, sums, and the channel mixer with each activation, output and every gradient."""

from typing import Any

import pytest
import torch
from support.comparing import largest
from torch import Tensor

LENGTHS, SLACK, HIDDEN, WIDTH = [1, 5, 0, 19, 2, 10], 3, 12, 20
ACTIVATIONS = ("swiglu", "geglu", "sglu", "relu2", "starrelu")


def defined(x: Tensor, weights: dict[str, Tensor], activation: str) -> Tensor:
    """The channel mixer as its paper has it, without a library's activation."""
    hidden = x @ weights["linear_fc1.weight"].T
    if activation in ("swiglu", "geglu", "sglu"):
        gate, up = hidden[..., :WIDTH], hidden[..., WIDTH:]
        if activation == "swiglu":
            gate = gate / (1 + (-gate).exp())
        if activation == "geglu":
            gate = gate * (1 + torch.special.erf(gate / 2**0.5)) / 2
        inside = gate * up
    else:
        inside = torch.where(hidden > 0, hidden * hidden, torch.zeros_like(hidden))
        if activation == "starrelu":
            inside = weights["activation_func.scale"] * inside + weights["activation_func.shift"]
    return inside @ weights["linear_fc2.weight"].T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_of(rank: int, ranks: int, channels: str, options: dict[str, Any]) -> dict[str, float]:
    """Differences of a layer from its definition, relative: of the output, and of the gradients of its input and parameters."""
    from support import parity

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.model.layer import HybridLayer
    from lsys.model.megatron_config import transformer_config
    from lsys.model.mixers.mixer import MixerOptions
    from lsys.model.packed import PackedMicroBatch
    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    changes = dict(
        model__pattern="L", model__layers=2, model__hidden=HIDDEN, model__ffn=WIDTH, model__channels=channels
    )
    settings = parity.settings(**changes, model__mixers={"dense": options})
    with process_groups(settings.parallel, Launch(rank=rank, world_size=ranks)) as groups:
        model = settings.model
        mixer = MixerOptions(model.cards["lightning"], settings.parallel.linear)
        [card] = model.channel_cards.values()
        layer: Any = HybridLayer(transformer_config(settings), 1, groups.collection, mixer, card).double()
        generator = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        tokens = sum(LENGTHS)
        x, weigh = torch.randn(2, tokens + SLACK, 1, HIDDEN, generator=generator, dtype=torch.float64)
        weigh[tokens:] = 0
        layout = SequenceLayout.contiguous(LENGTHS, 1)
        packed = PackedMicroBatch(layout=layout, positions=layout.positions(0))
        names, parameters = zip(*layer.named_parameters(), strict=True)
        y, _ = layer(x.requires_grad_(), packed_seq_params=packed)
        found = [y, *torch.autograd.grad((y * weigh).sum(), (x, *parameters))]
        weights = dict(layer.named_parameters())
        y = (
            x
            + layer.self_attention(
                norm(x, weights["input_layernorm.weight"], model.norm_eps), packed_seq_params=packed
            )[0]
        )
        if channels != "-":
            own = {name.removeprefix("mlp."): p for name, p in weights.items()}
            y = y + defined(norm(y, weights["pre_mlp_layernorm.weight"], model.norm_eps), own, options["activation"])
        wanted = [y, *torch.autograd.grad((y * weigh).sum(), (x, *parameters))]
        return {
            name: float((a - b).norm() / b.norm()) for name, a, b in zip(("y", "x", *names), found, wanted, strict=True)
        }


@pytest.mark.parametrize("activation", [*ACTIVATIONS, None])
def test_a_layer_is_its_definition(gloo: Any, activation: str | None) -> None:
    case = ("F", {"activation": activation}) if activation else ("-", {})
    [found] = gloo(1, layer_of, *case)
    assert largest(found.values()) < 1e-12, found
    assert ("mlp.linear_fc1.weight" in found) == (activation is not None) == ("pre_mlp_layernorm.weight" in found)
