"""lsys's configuration in Megatron's words."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.config import Config


def keep(weight: Tensor) -> Tensor:
    """Megatron's hook for initial weights: leave them; `lsys.model.parameters.initialise` fills them, alike for all degrees."""
    return weight


def transformer_config(settings: Config) -> TransformerConfig:
    """Megatron's configuration of the model and its parallelism.

    Three choices guard against silent errors of megatron-core 0.16.1: point-to-point transfers of the pipeline are not batched (wrong
    gradients with two stages of two virtual chunks); rotary positions are the mixers' own (its RoPE assumes zigzag order); the
    cross-entropy is not fused (the native fusion rounds its gradient to bf16).
    """
    model, parallel = settings.model, settings.parallel
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    full = settings.train.recompute == "full"
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_width,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        bias_activation_fusion=torch.cuda.is_available(),
        bias_dropout_fusion=torch.cuda.is_available(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=keep,
        output_layer_init_method=keep,
        embedding_init_method=keep,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        recompute_granularity="full" if full else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        hetereogenous_dist_checkpoint=True,
    )
