"""The definition: dense scores, one mask. Quadratic memory; any device and dtype."""

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [Tq, H, D], k, v [Tk, H_kv, D] -> o [Tq, H, D], lse [Tq, H]; computed in fp32, fp64 for fp64."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(accumulate).unflatten(1, (k.shape[1], -1))  # [Tq, H, D] -> [Tq, H_kv, H / H_kv, D]
    scores = torch.einsum("qhgd,khd->qhgk", grouped, k.to(accumulate)) * scale
    visible = visibility(lengths_q, lengths_k, causal, window, q.device)[:, None, None]  # [Tq, 1, 1, Tk]
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == -torch.inf, 0)  # a query without keys: probabilities e^-inf = 0 instead of nan
    o = torch.einsum("qhgk,khd->qhgd", (scores - finite.unsqueeze(-1)).exp(), v.to(accumulate))
    return o.flatten(1, 2).to(q.dtype), lse.flatten(1, 2).detach()  # [Tq, H_kv, H / H_kv, ...] -> [Tq, H, ...]


def visibility(
    lengths_q: list[int], lengths_k: list[int], causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which key each query sees: bool [Tq, Tk]."""
    sequence_q, position_q = _places(lengths_q, [m - n for n, m in zip(lengths_q, lengths_k, strict=True)], device)
    sequence_k, position_k = _places(lengths_k, [0] * len(lengths_k), device)
    visible = sequence_q[:, None] == sequence_k
    if causal:
        visible &= position_k <= position_q[:, None]
    if window is not None:
        visible &= position_k > position_q[:, None] - window
    return visible


def _places(lengths: list[int], first: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sequence of each row, and its position there when each sequence's rows begin at `first`."""
    if not lengths:
        return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    sequence = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) + start for n, start in zip(lengths, first, strict=True)])
    return sequence.to(device), position.to(device)
