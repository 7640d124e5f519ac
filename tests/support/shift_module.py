"""The module of `support.shifting`: it takes documents, slack and what it has kept from the micro-batch."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from lsys.model.mixers.heads import HeadParameters
from lsys.model.packed import PackedMicroBatch
from lsys.parallel.convolution import token_shift


class Mix(HeadParameters):
    weight: Tensor

    def __init__(self, config: Any, width: int, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        self.add("weight", (width,), lambda whole, generator: whole.uniform_(0, 1, generator=generator))


class ShiftMLP(MegatronModule):
    """W_2 ReLU(h + m (h' - h))^2 with h = W_1 x, and h' that of the token before in its document, zeros for the first."""

    def __init__(self, config: Any, layer_number: int, pg_collection: Any, card: Any) -> None:
        super().__init__(config=config)
        self.number, width = layer_number, card.model.ffn_width
        common = dict(config=config, bias=False, skip_bias_add=True, tp_group=pg_collection.tp)
        self.linear_fc1 = ColumnParallelLinear(config.hidden_size, width, init_method=config.init_method, **common)
        self.linear_fc2 = RowParallelLinear(
            width, config.hidden_size, init_method=config.init_method, input_is_parallel=True, **common
        )
        self.mix = Mix(config, width, pg_collection.tp)

    def forward(self, hidden_states: Tensor, *, packed_seq_params: PackedMicroBatch) -> tuple[Tensor, None]:
        packed = packed_seq_params
        h = self.linear_fc1(hidden_states)[0]  # [slots, 1, width / tensor]
        slots, tokens = len(h), len(packed.positions)
        h = h[:tokens, 0]
        mixed = torch.lerp(h, self._before(h, packed), self.mix.weight)
        inside = F.pad(F.relu(mixed).square(), (0, 0, 0, slots - tokens))[:, None]
        return self.linear_fc2(inside)[0], None

    def _before(self, h: Tensor, packed: PackedMicroBatch) -> Tensor:
        if packed.cache is None:
            return token_shift(h, packed.layout, packed.comm)
        kept = packed.cache.layer(self.number, "channels")
        first = kept.get("before", torch.zeros_like(h[:1]))
        kept["before"] = h[-1:]
        return torch.cat([first, h[:-1]])
