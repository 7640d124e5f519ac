"""The short causal convolution token by token: the definition."""

from collections.abc import Sequence

import torch
from torch import Tensor


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int], initial: Tensor | None = None
) -> Tensor:
    """y_t = bias + sum_j weight[:, W - 1 - j] x_(t - j) for j = 0 ... W - 1, in each sequence.

    x [T, C], weight [C, W], bias [C], initial [N, W - 1, C], the inputs before each sequence (default zero) -> [T, C], in fp32
    at least.
    """
    dtype, width = torch.promote_types(x.dtype, torch.float32), weight.shape[1]
    taps = weight.to(dtype).flip(1).unbind(1)  # of the token itself, of the one before it, ...
    outputs = [x[:0].to(dtype)]
    for sequence, part in enumerate(x.to(dtype).split(list(lengths))):
        before = part.new_zeros(width - 1, x.shape[1]) if initial is None else initial[sequence].to(dtype)
        inputs = torch.cat([before, part])
        for t in range(width - 1, len(inputs)):
            y = torch.stack([tap * inputs[t - j] for j, tap in enumerate(taps)]).sum(0)
            outputs.append((y if bias is None else y + bias.to(dtype))[None])
    return torch.cat(outputs)
