"""From the layer pattern to Megatron's ModuleSpecs."""

from importlib import import_module

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from lsys.config import Config
from lsys.config.methods import attention_methods
from lsys.mixers.card import Card
from lsys.model.mixers.mixer import Mixer, MixerOptions
from lsys.model.norm import RMSNorm
from lsys.parallel.comm import SequenceComm


def mixer_class(card: Card) -> type[Mixer]:
    """The module of a mixer, imported by the name on its card."""
    module, _, name = card.module.partition(":")
    return getattr(import_module(module), name)


def layer_spec(options: MixerOptions) -> ModuleSpec:
    """One pre-norm layer: norm, mixer, add, norm, SwiGLU, add."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=mixer_class(options.card), params={"options": options}),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(
    settings: Config, config: TransformerConfig, comm: SequenceComm, *, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk: the whole model's list, sliced by Megatron's own offset and count."""
    recompute = settings.train.recompute == "selective"
    methods = attention_methods(settings, comm.node_of_rank)
    options = {
        kind: MixerOptions(card, methods.get(kind, settings.parallel.linear), recompute)
        for kind, card in settings.model.cards.items()
    }
    specs = [layer_spec(options[kind]) for kind in settings.model.kinds]
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=specs[first : first + count], layer_norm=RMSNorm)
