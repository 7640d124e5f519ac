"""Small parameters that belong to heads: each tensor rank holds those of its heads, a cut along dim 0."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from lsys.kernels import short_convolution as kernel
from lsys.model.module_state import persistent
from lsys.model.packed import PackedMicroBatch
from lsys.parallel.convolution import short_convolution
from lsys.runtime.groups import own_device

Initial = Callable[[Tensor, torch.Generator], Any]  # fills the whole parameter, fp32


def ones(whole: Tensor, generator: torch.Generator) -> Tensor:
    return whole.fill_(1.0)


def zeros(whole: Tensor, generator: torch.Generator) -> Tensor:
    return whole.zero_()


def upcast(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HeadParameters(MegatronModule):
    """Parameters that are cut along dim 0 over the tensor ranks. Those of one dimension get no weight decay (Megatron's rule).

    Cut is what `add` and `add_state` make; what else it holds, modules included, is as in any module: a buffer the same on all ranks.
    """

    def __init__(self, config: TransformerConfig, tp_group: Any) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self._cut: set[str] = set()

    def add(self, name: str, shape: tuple[int, ...], initial: Initial) -> None:
        """A parameter of this whole shape; `lsys.model.parameters.initialise` fills it."""
        local = (shape[0] // self.tp_group.size(), *shape[1:])
        parameter = torch.nn.Parameter(torch.empty(local, dtype=self.config.params_dtype, device=own_device()))
        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        parameter.initial = initial  # type: ignore[attr-defined]
        self.register_parameter(name, parameter)
        self._cut.add(name)

    def add_state(
        self, name: str, shape: tuple[int, ...], value: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        """A state that is no parameter, of this whole shape (`lsys.model.module_state`)."""
        local = (shape[0] // self.tp_group.size(), *shape[1:])
        self.register_buffer(name, torch.full(local, value, dtype=dtype, device=own_device()))
        self._cut.add(name)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        whole = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        cut = {name: tensor for name, tensor in persistent(self).items() if name in self._cut}
        group = (metadata or {})["dp_cp_group"]
        return whole | make_sharded_tensors_for_checkpoint(
            cut, prefix, dict.fromkeys(cut, 0), sharded_offsets, tp_group=self.tp_group, dp_cp_group=group
        )


class HeadNorm(HeadParameters):
    """RMSNorm inside each head, with a weight for every channel of every head: x [T, H, D] -> [T, H, D].

    Normalising inside a head needs no sum over tensor ranks.
    """

    weight: Tensor  # [H * D / tensor]

    def __init__(self, config: TransformerConfig, heads: int, head_dim: int, eps: float, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        self.head_dim, self.eps = head_dim, eps
        self.add("weight", (heads * head_dim,), ones)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.head_dim,), None, self.eps) * self.weight.view(-1, self.head_dim)


class ShortConvolution(HeadParameters):
    """Causal convolution over the last `width` tokens of the document, each channel by itself, then SiLU: x [T_r, C] -> [T_r, C]."""

    weight: Tensor  # [C / tensor, width]
    bias: Tensor | None  # [C / tensor]

    def __init__(self, config: TransformerConfig, channels: int, width: int, bias: bool, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        bound = width**-0.5  # torch.nn.Conv1d's initial range
        self.add(
            "weight", (channels, width), lambda whole, generator: whole.uniform_(-bound, bound, generator=generator)
        )
        if bias:
            self.add("bias", (channels,), zeros)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, packed: PackedMicroBatch, kept: dict[str, Tensor] | None) -> Tensor:
        """kept: of the document's tokens before these, the last `width` - 1 inputs; replaced by those of the tokens so far."""
        if kept is None:
            return short_convolution(x, self.weight, packed.layout, packed.comm, self.bias, "silu")
        initial = kept.get("inputs")
        kept["inputs"] = kernel.before_next(x, self.weight.shape[1] - 1, initial)
        return kernel.short_convolution(x, self.weight, self.bias, initial=initial, activation="silu")


class StepDecay(HeadParameters):
    """Step size and decay per token and head (Mamba-2): dt = softplus(raw + dt_bias), log-decay = -e^A_log dt.

    raw [T, H] -> dt, log-decay [T, H], in fp32 at least. In half precision the parameters are rounded too, as Megatron's own
    Mamba layer has them; the optimizer's copies are fp32. (Its distributed optimizer mixes up the states of a group with two dtypes
    when it saves them.)
    """

    A_log: Tensor  # [H / tensor]
    dt_bias: Tensor  # [H / tensor]

    def __init__(self, config: TransformerConfig, heads: int, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        self.add("A_log", (heads,), _initial_rate)
        self.add("dt_bias", (heads,), _initial_step)

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(upcast(raw) + self.dt_bias)
        return dt, -upcast(self.A_log).exp() * dt


def _initial_rate(whole: Tensor, generator: torch.Generator) -> Tensor:
    """Rates are uniform between 1 and 16 (Mamba-2)."""
    return whole.uniform_(1, 16, generator=generator).log_()


def _initial_step(whole: Tensor, generator: torch.Generator) -> Tensor:
    """Steps are log-uniform between 0.001 and 0.1 where raw is 0 (Mamba): dt_bias is softplus's inverse of them."""
    dt = whole.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    return whole.copy_(dt + torch.log(-torch.expm1(-dt)))
