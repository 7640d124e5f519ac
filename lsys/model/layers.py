"""From the layer pattern to Megatron's ModuleSpecs."""

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
from lsys.model.delta import GatedDeltaMixer
from lsys.model.gla import GatedLinearMixer
from lsys.model.lightning import LightningMixer
from lsys.model.mamba2 import Mamba2Mixer
from lsys.model.mixer import Mixer, MixerOptions
from lsys.model.norm import RMSNorm
from lsys.model.retention import RetentionMixer
from lsys.model.softmax import SoftmaxMixer, WindowMixer
from lsys.parallel.comm import SequenceComm

MIXERS: dict[str, type[Mixer]] = {
    "S": SoftmaxMixer,
    "W": WindowMixer,
    "L": LightningMixer,
    "R": RetentionMixer,
    "G": GatedLinearMixer,
    "M": Mamba2Mixer,
    "D": GatedDeltaMixer,
}


def layer_spec(kind: str, options: MixerOptions) -> ModuleSpec:
    """One pre-norm layer: norm, mixer of the given kind, add, norm, SwiGLU, add."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=MIXERS[kind], params={"options": options}),
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
    methods = attention_methods(settings, comm.node_of_rank)
    recompute = settings.train.recompute == "selective"
    options = MixerOptions(settings.model, settings.parallel, comm, methods, recompute)
    specs = [layer_spec(kind, options) for kind in settings.model.kinds]
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=specs[first : first + count], layer_norm=RMSNorm)
