"""`L`: Lightning linear attention with a fixed decay per head and a gated output norm."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from lsys.model.mixer import Mixer, MixerOptions
from lsys.model.packed import PackedMicroBatch
from lsys.parallel.linear import linear_attention


def decay_rates(heads: int, layer: int, layers: int) -> Tensor:
    """Log-decay per head, fp32 [heads], of layer `layer` (from 0) of `layers`: -2^(-8 (h+1) / heads) (1 - layer / (layers - 1) + 1e-5).

    ALiBi's slopes (Press et al., 2022), falling to almost no decay in the last layer: TransNormerLLM (Qin et al., 2023), MiniMax-01 (2025).
    """
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    return (-slopes * (1 - layer / max(layers - 1, 1) + 1e-5)).float()


class HeadNorm(MegatronModule):
    """RMSNorm inside each head, with a weight for every channel of every head: x [T, H, D] -> [T, H, D].

    Normalising inside a head needs no sum over tensor ranks; the weight [H * D] is sharded over them as the heads are.
    """

    def __init__(self, config: TransformerConfig, heads: int, head_dim: int, eps: float, tp_group: Any) -> None:
        super().__init__(config=config)
        self.head_dim, self.eps, self.tp_group = head_dim, eps, tp_group
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        width = heads * head_dim // tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.head_dim,), None, self.eps) * self.weight.view(-1, self.head_dim)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class LightningMixer(Mixer):
    """o = W_o (norm(linear_attention(silu q, silu k, silu v)) * sigmoid(g)), decay fixed per head (Lightning attention, MiniMax-01).

    `in_proj` is laid out head by head [q, k, v, gate], so a tensor rank owns whole heads.
    """

    log_decay: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        options: MixerOptions,
        **unused: Any,
    ) -> None:
        model = options.model
        heads, self.head_dim = model.linear_heads, model.linear_head_width
        width = heads * self.head_dim
        super().__init__(config, layer_number, pg_collection, options, in_width=4 * width, out_width=width)
        self.out_norm = HeadNorm(config, heads, self.head_dim, model.norm_eps, pg_collection.tp)
        rates = decay_rates(heads, layer_number - 1, model.layers)
        mine = rates.chunk(pg_collection.tp.size())[pg_collection.tp.rank()]
        self.register_buffer("log_decay", mine.to(self.out_norm.weight.device), persistent=False)

    def mix(self, projected: Tensor, packed: PackedMicroBatch) -> Tensor:
        tokens = len(projected)
        qkv, gate = projected.view(tokens, -1, 4, self.head_dim).split((3, 1), dim=2)  # [T_r, H, 3, D], [T_r, H, 1, D]
        q, k, v = F.silu(qkv).unbind(2)  # each [T_r, H, D]
        decay = self.log_decay if self.options.model.linear.decay else None
        o, _ = linear_attention(q, k, v, packed.layout, self.comm, log_decay=decay, method=self.options.parallel.linear)
        return (self.out_norm(o) * torch.sigmoid(gate.squeeze(2))).reshape(tokens, -1)
