"""Softmax attention with grouped keys, QK-norm and rotary positions."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.kernels.softmax_attention import softmax_attention as kernel
from lsys.mixers.attention import AttentionCard
from lsys.model.mixers.mixer import Mixer, MixerOptions
from lsys.model.norm import RMSNorm
from lsys.model.packed import PackedMicroBatch, apply_rotary
from lsys.parallel.attention import softmax_attention


class SoftmaxMixer(Mixer):
    """Causal softmax attention inside each document (GQA: Ainslie et al., 2023; QK-norm: Dehghani et al., 2023).

    `in_proj` is laid out as Megatron's fused QKV, group by group [queries of the group, key, value], so a slice of its rows is
    whatever a tensor rank owns: whole groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        options: MixerOptions,
        **unused: Any,
    ) -> None:
        super().__init__(config, layer_number, pg_collection, options)
        card, model = options.card, self.model
        assert isinstance(card, AttentionCard)
        self.mask = card.mask
        self.head_dim, self.queries_per_group = model.head_width, model.heads // model.kv_heads
        if model.qk_norm:
            self.q_layernorm = RMSNorm(config, self.head_dim, model.norm_eps)
            self.k_layernorm = RMSNorm(config, self.head_dim, model.norm_eps)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        tokens, n = len(projected), self.queries_per_group
        grouped = projected.view(tokens, -1, n + 2, self.head_dim)  # [T_r, groups, queries + 2, D]
        q = grouped[:, :, :n].reshape(tokens, -1, self.head_dim)  # [T_r, heads, D]
        k, v = grouped[:, :, n], grouped[:, :, n + 1]  # [T_r, groups, D]
        if self.model.qk_norm:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        rotary = packed.rotary(self.model.rope_base, self.head_dim)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        kept = self.layer_cache(packed)
        if kept is not None:
            return self._go_on(q, k, v, kept).reshape(tokens, -1)
        method = self.options.method
        o = softmax_attention(q, k, v, packed.layout, packed.comm, method=method, mask=self.mask)
        return o.reshape(tokens, -1)

    def _go_on(self, q: Tensor, k: Tensor, v: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """Attention of the next tokens of a document to those before them, whose keys and values are kept, and to each other."""
        if kept:
            k, v = torch.cat((kept["k"], k)), torch.cat((kept["v"], v))
        reach = self.mask.reach()  # of the tokens that follow
        first = 0 if reach is None else max(len(k) - reach, 0)
        # Copies: views would hold on to all keys and values.
        kept["k"], kept["v"] = (k, v) if first == 0 else (k[first:].clone(), v[first:].clone())
        bounds = (torch.tensor([0, len(x)]) for x in (q, k))
        return kernel(q, k, v, cu_seqlens_q=next(bounds), cu_seqlens_k=next(bounds), mask=self.mask)[0]
