"""Short causal convolution along the tokens of packed sequences, each channel by itself, on one device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.kernels.short_convolution import fused, reference, sliding

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "activate",
    "before_next",
    "enter",
    "fits",
    "from_zero",
    "is_fused",
    "short_convolution",
]

BACKENDS = ("auto", "reference", "sliding", "triton")
ACTIVATIONS = (None, "silu")


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    initial: Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = activation(bias + sum_j weight[:, W - 1 - j] x_(t - j)) for j = 0 ... W - 1, anew in each sequence.

    The last column of the weight is that of the token itself, as in a causal `torch.nn.Conv1d` with one group a channel (H3:
    Fu et al., 2022; Mamba: Gu & Dao, 2023). Sums are in fp32, those of fp64 inputs in fp64. Differentiable in all tensors.

    Args:
        x: [T, C].
        weight: [C, W], W >= 1.
        bias: [C].
        cu_seqlens: where each of N packed sequences begins, then T: int64 [N + 1]; None is one sequence.
        initial: [N, W - 1, C], the inputs before each sequence, the last of them next to it; default zero.
        activation: None or "silu".
        backend: "reference" is the definition, token by token; "sliding" is by shifted sums; "triton" is one kernel (CUDA, and
            interpreted on CPU); "auto" takes "triton" on CUDA where it takes dtype and width, else "sliding".

    Returns:
        [T, C] in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, an activation or a backend that does not exist or does not take them.
    """
    lengths = _check(x, weight, bias, cu_seqlens)
    if backend not in BACKENDS:
        raise ValueError(f"short convolution backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    wanted = [len(lengths), weight.shape[1] - 1, x.shape[1]]
    if initial is not None and [*initial.shape] != wanted:
        raise ValueError(f"initial is {[*initial.shape]}; [N, W - 1, C] makes it {wanted}")
    if backend == "reference":
        return activate(reference.convolution(x, weight, bias, lengths, initial), activation, x.dtype)
    if is_fused(x, weight, activation, backend):
        return fused.convolution(x, weight, bias, lengths, initial, activation)
    out = sliding.convolution(x, weight, bias, lengths)
    if initial is not None:
        out = enter(out, initial, weight, lengths)
    return activate(out, activation, x.dtype)


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are x [T, C], weight [C, W] and bias [C]."""
    is_pair = x.dim() == 2 and weight.dim() == 2 and weight.shape[0] == x.shape[1] and weight.shape[1] > 0
    return is_pair and (bias is None or [*bias.shape] == [x.shape[1]])


def is_fused(x: Tensor, weight: Tensor, activation: str | None, backend: str) -> bool:
    """Whether one kernel does it all.

    Raises:
        ValueError: `backend` is "triton", which does not take them, or `activation` does not exist.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of: None, silu")
    refusal = (
        fused.refusal(x, weight) if backend == "triton" or (backend == "auto" and x.is_cuda) else "is not asked for"
    )
    if backend == "triton" and refusal:
        raise ValueError(f"short convolution backend 'triton' {refusal}; backend 'sliding' computes it")
    return refusal is None


def from_zero(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, list[int]]:
    """The sums alone with nothing before the sequences, [T, C] in fp32 at least, and the lengths: the part that needs no exchange."""
    lengths = _check(x, weight, bias, cu_seqlens)
    return sliding.convolution(x, weight, bias, lengths), lengths


def enter(out: Tensor, initial: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """Add to sums [T, C] what tokens get of the inputs before their sequences, [N, W - 1, C]."""
    reach = weight.shape[1] - 1
    if reach == 0 or len(out) == 0:
        return out
    taps = weight.to(out.dtype).T  # [W, C]: taps[m - i] weighs input m of `initial` for token i of the sequence
    initial = initial.to(out.dtype)
    added = torch.stack([(initial[:, i:] * taps[: reach - i]).sum(1) for i in range(reach)], dim=1)  # [N, W - 1, C]
    length = torch.tensor(lengths, dtype=torch.int64)
    place = torch.arange(reach)
    is_token = place < length[:, None]  # [N, W - 1]
    rows = ((length.cumsum(0) - length)[:, None] + place)[is_token].to(out.device, non_blocking=True)
    which = is_token.flatten().nonzero().squeeze(1).to(out.device, non_blocking=True)
    return out.index_add(0, rows, added.flatten(0, 1).index_select(0, which))


def before_next(x: Tensor, reach: int, initial: Tensor | None = None) -> Tensor:
    """The last `reach` inputs of a sequence and what came before it, which its next tokens need: x [T, C] -> [1, reach, C].

    Args:
        initial: [1, reach, C], the inputs before x; default zero.
    """
    before = x.new_zeros(reach, *x.shape[1:]) if initial is None else initial[0].to(x.dtype)
    return torch.cat([before, x])[len(x) :][None]


def activate(x: Tensor, activation: str | None, dtype: torch.dtype) -> Tensor:
    """Apply an activation, None or "silu", and give the result in `dtype`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of: None, silu")
    return (F.silu(x) if activation else x).to(dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None) -> list[int]:
    """The lengths of the sequences, if all fits."""
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(f"short convolution takes x [T, C] and weight [C, W]; got {[*x.shape]} and {[*weight.shape]}")
    if bias is not None and [*bias.shape] != [x.shape[1]]:
        raise ValueError(f"bias is {[*bias.shape]}; there are {x.shape[1]} channels")
    if cu_seqlens is None:
        return [len(x)]
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if not bounds or bounds[0] != 0 or bounds[-1] != len(x) or min(lengths, default=0) < 0:
        shown = str(bounds[:8])[:-1] + (", ...]" if len(bounds) > 8 else "]")
        raise ValueError(f"cu_seqlens goes from 0 to T = {len(x)} and does not decrease; got {shown}")
    return lengths
