"""The frame of every token mixer: project in, mix the tokens of documents, project out."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.config.schema import Model, Parallel
from lsys.model.packed import PackedMicroBatch
from lsys.parallel.comm import SequenceComm


@dataclass(frozen=True)
class MixerOptions:
    """What a mixer takes from the configuration beside Megatron's own.

    Attributes:
        comm: the context ranks.
        attention: how each kind of softmax layer crosses them.
    """

    model: Model
    parallel: Parallel
    comm: SequenceComm
    attention: dict[str, str]
    recompute: bool = False


class Mixer(MegatronModule):
    """Replaces Megatron's self-attention in a layer. Subclasses say the widths and implement `mix`.

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
        *,
        in_width: int,
        out_width: int,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.options = layer_number, options
        self.tp_group, self.comm = pg_collection.tp, options.comm
        common = dict(config=config, bias=False, skip_bias_add=True, tp_group=pg_collection.tp)
        self.in_proj = ColumnParallelLinear(config.hidden_size, in_width, init_method=config.init_method, **common)
        self.out_proj = RowParallelLinear(
            out_width, config.hidden_size, init_method=config.output_layer_init_method, input_is_parallel=True, **common
        )

    @abstractmethod
    def mix(self, projected: Tensor, packed: PackedMicroBatch) -> Tensor:
        """projected [T_r, in_width / tensor] -> [T_r, out_width / tensor]."""

    def forward(
        self, hidden_states: Tensor, *unused: Any, packed_seq_params: PackedMicroBatch, **also_unused: Any
    ) -> Any:
        """hidden_states [slots / tensor, 1, hidden] -> ([slots / tensor, 1, hidden], no bias)."""
        projected, _ = self.in_proj(
            hidden_states
        )  # gathers the slots over the tensor ranks -> [slots, 1, in_width / tensor]
        mix = partial(self._mix_documents, packed=packed_seq_params)
        if self.options.recompute and self.training:
            mixed = tensor_parallel.checkpoint(mix, False, projected)
        else:
            mixed = mix(projected)
        return self.out_proj(mixed)

    def _mix_documents(self, projected: Tensor, packed: PackedMicroBatch) -> Tensor:
        slots, tokens = len(projected), len(packed.positions)
        mixed = self.mix(projected[:tokens, 0], packed)  # [slots, 1, in] -> [T_r, out]
        return F.pad(mixed, (0, 0, 0, slots - tokens)).unsqueeze(1)  # [T_r, out] -> [slots, 1, out]
