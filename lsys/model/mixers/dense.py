"""`F`: the dense MLP, by Megatron, with the activation that the card names."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.mixers.dense import Dense
from lsys.model.packed import PackedMicroBatch
from lsys.runtime.groups import own_device


def _identity(x: Tensor) -> Tensor:
    return x


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Of gated ones, what gates the other half.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "sglu": _identity,
    "relu2": _relu2,
}


class DenseMLP(MLP):
    """W_2 f(W_1 x) with the activation f of `model.mixers.dense`, its W_1 cut by rows over the tensor ranks and W_2 by columns.

    SwiGLU and GeGLU (with erf): Shazeer, 2020; SGLU, without an activation: Qin et al., TransNormerLLM, 2023; ReLU^2: So et al., Primer,
    2021; StarReLU: Yu et al., MetaFormer Baselines, 2022.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        card: Dense,
    ) -> None:
        name, own = card.own.activation, copy.copy(config)
        own.ffn_hidden_size, own.gated_linear_unit = card.width, card.activation.gated
        # Megatron's fused kernels are SwiGLU's, and a GeGLU with the tanh form.
        own.bias_activation_fusion = config.bias_activation_fusion and card.activation.fused is not None
        own.activation_func = StarReLU(config) if name == "starrelu" else ACTIVATIONS[name]
        layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(own, layers, ffn_hidden_size=card.width, tp_group=pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, *unused: Any, packed_seq_params: PackedMicroBatch | None = None
    ) -> tuple[Tensor, None]:
        """hidden_states [slots / tensor, 1, hidden] -> (the same shape, no bias)."""
        return super().forward(hidden_states)


class StarReLU(MegatronModule):
    """s ReLU(x)^2 + b with scalars s, b that are learnt, of mean 0 and variance 1 for x ~ N(0, 1) at the start.

    Every tensor rank has both and sees its own channels; the mark makes Megatron sum their gradients.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        for name, value in (("scale", 0.8944), ("shift", -0.4472)):
            parameter = torch.nn.Parameter(torch.full((1,), value, dtype=config.params_dtype, device=own_device()))
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            parameter.initial = lambda whole, generator, value=value: whole.fill_(value)  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x).square() + self.shift
