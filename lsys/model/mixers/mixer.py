"""The frame of every token mixer: project in, mix the tokens of documents, project out."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.mixers.card import Card
from lsys.model.packed import PackedMicroBatch
from lsys.runtime.groups import own_device


@dataclass(frozen=True)
class MixerOptions:
    """What a mixer takes beside Megatron's own configuration.

    Attributes:
        card: the mixer in this model. method: how it crosses the context ranks.
        recompute: whether `mix` is run again in the backward pass.
    """

    card: Card
    method: str
    recompute: bool = False


class Mixer(MegatronModule):
    """Replaces Megatron's self-attention in a layer. The card says the widths; subclasses implement `mix`.

    The residual stream has a constant number of slots on every rank; the last few may be slack that no document fills. Mixers see
    documents' tokens only: slack is cut off before `mix` and comes back as zeros.

    Megatron's selective recompute names its own attention, which this module replaces; so `recompute` checkpoints `mix` here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        options: MixerOptions,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        card = options.card
        self.layer_number, self.options, self.model = layer_number, options, card.model
        self.tp_group = pg_collection.tp
        common = dict(config=config, bias=False, skip_bias_add=True, tp_group=pg_collection.tp)
        self.in_proj = ColumnParallelLinear(config.hidden_size, card.in_width, init_method=config.init_method, **common)
        self.out_proj = RowParallelLinear(
            card.out_width,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **common,
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the first layer of its kind in the model."""
        return self.model.kinds.index(self.options.card.key) == self.layer_number - 1

    @abstractmethod
    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        """projected [T_r, in_width / tensor] -> [T_r, out_width / tensor]; `more`: what else `project` gives, [T_r, ...] each."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """[slots / tensor, 1, hidden] -> [slots, 1, in_width / tensor]: gathers the slots over the tensor ranks."""
        return (self.in_proj(hidden_states)[0],)

    def layer_cache(self, packed: PackedMicroBatch) -> dict[str, Tensor] | None:
        """What this layer keeps of the document's earlier tokens, to be read and replaced; None in training."""
        return None if packed.cache is None else packed.cache.layer(self.layer_number)

    def forward(
        self, hidden_states: Tensor, *unused: Any, packed_seq_params: PackedMicroBatch, **also_unused: Any
    ) -> Any:
        """hidden_states [slots / tensor, 1, hidden] -> ([slots / tensor, 1, hidden], no bias)."""
        projected = self.project(hidden_states)
        mix = partial(self._mix_documents, packed=packed_seq_params)
        if self.options.recompute and self.training:
            mixed = tensor_parallel.checkpoint(mix, False, *projected)
        else:
            mixed = mix(*projected)
        return self.out_proj(mixed)

    def _mix_documents(self, *projected: Tensor, packed: PackedMicroBatch) -> Tensor:
        slots, tokens = len(projected[0]), len(packed.positions)
        first, *more = (x[:tokens, 0] for x in projected)  # [slots, 1, width] -> [T_r, width]
        mixed = self.mix(first, packed, *more)
        return F.pad(mixed, (0, 0, 0, slots - tokens)).unsqueeze(1)  # [T_r, out] -> [slots, 1, out]


class SharedLinear(torch.nn.Module):
    """x W^T of what all heads share: [slots / tensor, 1, in] -> [slots / tensor, 1, out], the whole W on every tensor rank.

    Under sequence parallelism each tensor rank sees some of the tokens; the mark makes Megatron sum the weight's gradients.
    """

    def __init__(self, config: TransformerConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(out_width, in_width, dtype=config.params_dtype, device=own_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
