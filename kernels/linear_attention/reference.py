"""Linear attention token by token: the definition."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked import SegmentMap


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = e^(g_t) S_(t-1) + k_t v_t^T and o_t = scale q_t S_t in each segment, from its `initial` state or zero.

    q, k [T, H_k, K], v [T, H, V], log_decay g [H] or [T, H], initial [N, H, K, V] -> o [T, H, V], states [N, H, K, V].
    """
    dtype, (tokens, heads, width) = torch.promote_types(v.dtype, torch.float32), v.shape
    q, k = (x.to(dtype).repeat_interleave(heads // k.shape[1], dim=1) for x in (q, k))  # [T, H, K]
    decay = torch.zeros_like(v[..., 0], dtype=dtype) if log_decay is None else log_decay.to(dtype).expand(tokens, heads)
    outputs, states, stops = [v[:0].to(dtype)], [], accumulate(lengths)
    for segment, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
        state = v.new_zeros(heads, k.shape[-1], width, dtype=dtype) if initial is None else initial[segment].to(dtype)
        for t in range(stop - length, stop):
            state = decay[t].exp()[:, None, None] * state + k[t, :, :, None] * v[t, :, None].to(dtype)
            outputs.append(scale * torch.einsum("hk,hkv->hv", q[t], state)[None])
        states.append(state)
    final = torch.stack(states) if states else v.new_zeros(0, heads, k.shape[-1], width, dtype=dtype)
    return torch.cat(outputs).to(v.dtype), final


class ReferenceSegments:
    """The two phases by the definition, which runs once in each."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        lengths: Sequence[int],
        linked: Sequence[int],
        scale: float,
    ) -> None:
        self.inputs = (q, k, v, log_decay, lengths, scale)
        self.linked = torch.tensor(linked, dtype=torch.int64, device=v.device)

    def segment_map(self) -> SegmentMap:
        """The maps of the linked segments."""
        _, _, v, log_decay, lengths, _ = self.inputs
        _, state = recurrence(*self.inputs)
        state = state.index_select(0, self.linked)
        if log_decay is None:
            return SegmentMap(None, state)
        parts = log_decay.to(state.dtype).expand(*v.shape[:2]).split(list(lengths))
        totals = torch.stack([part.sum(0) for part in parts]) if parts else state.new_zeros(0, v.shape[1])
        return SegmentMap(totals.index_select(0, self.linked), state)

    def intra(self) -> Tensor:
        """Nothing can be had before the states."""
        return torch.zeros_like(self.inputs[2])

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each linked segment, None is zero."""
        q, k, v, log_decay, lengths, scale = self.inputs
        if state is not None:
            zero = state.new_zeros(len(lengths), *state.shape[1:])
            state = zero.index_copy(0, self.linked, state)
        o, _ = recurrence(q, k, v, log_decay, lengths, scale, state)
        return intra + o
