"""From the layer patterns to Megatron's ModuleSpecs."""

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from lsys.config import Config
from lsys.config.methods import attention_methods
from lsys.model.layer import HybridLayer
from lsys.model.mixers.mixer import MixerOptions
from lsys.model.norm import RMSNorm
from lsys.parallel.comm import SequenceComm


def block_spec(
    settings: Config, config: TransformerConfig, comm: SequenceComm, *, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk: the whole model's list, sliced by Megatron's own offset and count."""
    model, recompute = settings.model, settings.train.recompute == "selective"
    methods = attention_methods(settings, comm.node_of_rank)
    mixers = {
        kind: MixerOptions(card, methods.get(kind, settings.parallel.linear), recompute)
        for kind, card in model.cards.items()
    }
    channels = model.channel_cards
    specs = [
        ModuleSpec(module=HybridLayer, params={"mixer": mixers[kind.mixer], "channels": channels[kind.channels]})
        for kind in model.layer_kinds
    ]
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=specs[first : first + count], layer_norm=RMSNorm)
