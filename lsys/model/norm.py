"""RMSNorm that carries Megatron's sequence-parallel mark."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.runtime.groups import own_device


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich, 2019).

    Under sequence parallelism each tensor rank sees some of the tokens, so the weight's gradients must be summed over the tensor
    group; Megatron does that for parameters with the mark `sequence_parallel`. (Its own torch norm refuses sequence parallelism.)
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=own_device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
