"""Linear attention token by token: the definition of all variants."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked import SegmentMap
from lsys.kernels.linear_attention.chunked.chunks import Tokens
from lsys.kernels.linear_attention.transition import identity


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S = e^(g_t) S_(t-1); S_t = S + k_t v_t^T, or S + beta_t k_t (v_t - S^T k_t)^T with beta; o_t = scale S_t^T q_t.

    In each segment, from its `initial` state or zero. q, k [T, H_k, K], v [T, H, V], log_decay g [H], [T, H] or
    [T, H, K], beta [T, H], initial [N, H, K, V] -> o [T, H, V], states [N, H, K, V].
    """
    dtype, (tokens, heads, width) = torch.promote_types(v.dtype, torch.float32), v.shape
    q, k = (x.to(dtype).repeat_interleave(heads // k.shape[1], dim=1) for x in (q, k))  # [T, H, K]
    keep = v.new_ones(1, 1, 1, dtype=dtype) if log_decay is None else log_decay.to(dtype).exp()
    keep = keep if keep.dim() == 3 else keep.expand(tokens, heads).unsqueeze(-1)
    keep = keep.expand(tokens, heads, k.shape[-1])  # [T, H, K]
    # Without tokens the output depends on all inputs, too: where ranks share a sequence, all take part in the backward pass.
    none = (q[:0] * k[:0] * keep[:0]).sum(-1, keepdim=True) * v[:0].to(dtype)
    none = none if beta is None else none * beta[:0, :, None].to(dtype)
    outputs, states, stops = [none], [], accumulate(lengths)
    for segment, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
        state = v.new_zeros(heads, k.shape[-1], width, dtype=dtype) if initial is None else initial[segment].to(dtype)
        for t in range(stop - length, stop):
            state, written = keep[t, :, :, None] * state, v[t].to(dtype)
            if beta is not None:
                written = beta[t, :, None].to(dtype) * (written - torch.einsum("hk,hkv->hv", k[t], state))
            state = state + k[t, :, :, None] * written[:, None]
            outputs.append(scale * torch.einsum("hk,hkv->hv", q[t], state)[None])
        states.append(state)
    final = torch.stack(states) if states else v.new_zeros(0, heads, k.shape[-1], width, dtype=dtype)
    return torch.cat(outputs).to(v.dtype), final


class ReferenceSegments:
    """The two phases by the definition, which runs once in each."""

    def __init__(self, tokens: Tokens, lengths: Sequence[int], external: Sequence[int], scale: float) -> None:
        self.inputs = (*tokens, lengths, scale)
        self.external = torch.tensor(external, dtype=torch.int64, device=tokens.v.device)

    def segment_map(self) -> SegmentMap:
        """The maps of the segments with external state."""
        _, state = recurrence(*self.inputs)
        transition = self._transition(state)
        transition = None if transition is None else transition.index_select(0, self.external)
        return SegmentMap(transition, state.index_select(0, self.external))

    def _transition(self, state: Tensor) -> Tensor | None:
        """By segment, what its tokens make of a state before: [N, H], [N, H, K] or, of the delta rule, of 1 without values, [N, H, K, K]."""
        q, k, v, log_decay, beta, lengths, scale = self.inputs
        if beta is not None:
            start = identity(state.new_zeros(0, state.shape[1], k.shape[-1], k.shape[-1]), len(lengths))
            nothing = v.new_zeros(*v.shape[:2], k.shape[-1])
            return recurrence(q, k, nothing, log_decay, beta, lengths, scale, start)[1]
        if log_decay is None:
            return None
        each = log_decay.to(state.dtype).expand(*v.shape[:2]) if log_decay.dim() == 1 else log_decay.to(state.dtype)
        parts = each.split(list(lengths))
        return torch.stack([part.sum(0) for part in parts]) if parts else each.new_zeros(0, *each.shape[1:])

    def intra(self) -> Tensor:
        """Nothing can be had before the states."""
        return torch.zeros_like(self.inputs[2])

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each segment with external state, None is zero."""
        lengths = self.inputs[5]
        if state is not None:
            zero = state.new_zeros(len(lengths), *state.shape[1:])
            state = zero.index_copy(0, self.external, state)
        o, _ = recurrence(*self.inputs, state)
        return intra + o
