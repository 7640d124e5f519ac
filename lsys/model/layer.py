"""A layer: a token mixer and a channel mixer, each between a norm and the sum with the residual stream."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from lsys.mixers.channel import ChannelCard
from lsys.mixers.registry import module_class
from lsys.model.mixers.mixer import MixerOptions
from lsys.model.norm import RMSNorm
from lsys.model.packed import PackedMicroBatch


class HybridLayer(MegatronModule, BaseTransformerLayer):
    """x -> y = x + mixer(norm(x)) -> y + channels(norm(y)): pre-norm (Xiong et al., 2020).

    Its parameters are called as in Megatron's layer, whose MLP does not see the micro-batch: `input_layernorm`, `self_attention`,
    `pre_mlp_layernorm`, `mlp`. A layer without a channel mixer ends with the first sum, and has neither of the last two.

    Args:
        mixer: card and method of the token mixer. channels: card of the channel mixer.
        layer_number: in this pipeline chunk, from 1; the attribute is that in the whole model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        mixer: MixerOptions,
        channels: ChannelCard,
        vp_stage: int | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        place = dict(config=config, layer_number=self.layer_number, pg_collection=pg_collection)
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = module_class(mixer.card)(**place, options=mixer)
        self.has_channels = not channels.is_empty
        if self.has_channels:
            self.pre_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.mlp = module_class(channels)(**place, card=channels)

    def forward(
        self, hidden_states: Tensor, *unused: Any, packed_seq_params: PackedMicroBatch, **also_unused: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [slots / tensor, 1, hidden] -> (the same shape, Megatron's context of cross-attention)."""
        packed = packed_seq_params
        mixed, _ = self.self_attention(self.input_layernorm(hidden_states), packed_seq_params=packed)
        hidden_states = hidden_states + mixed
        if self.has_channels:
            mixed, _ = self.mlp(self.pre_mlp_layernorm(hidden_states), packed_seq_params=packed)
            hidden_states = hidden_states + mixed
        return hidden_states, None
