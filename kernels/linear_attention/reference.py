"""The definition of linear attention: token after token, plain PyTorch."""

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    lengths: tuple[int, ...],
    initial: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T,  o_t = scale q_t^T S_t, from `initial` in each segment.

    q, k [T, H_k, K], v [T, H, V], log_decay None | [H] | [T, H], initial [N, H, K, V] -> o [T, H, V], states after the segments [N, H, K, V].
    """
    work = torch.promote_types(v.dtype, torch.float32)
    repeat = v.shape[1] // k.shape[1]
    q, k = (x.to(work).repeat_interleave(repeat, 1) for x in (q, k))
    gate = torch.zeros(v.shape[1], dtype=work, device=v.device) if log_decay is None else log_decay.to(work)
    decay = gate.expand(v.shape[:2]).exp()  # [T, H]
    outputs, states, t = [], [], 0
    for segment, length in enumerate(lengths):
        zero = torch.zeros(v.shape[1], k.shape[-1], v.shape[-1], dtype=work, device=v.device)
        state = zero if initial is None else initial[segment].to(work)
        for _ in range(length):
            state = decay[t, :, None, None] * state + k[t, :, :, None] * v[t, :, None, :].to(work)
            outputs.append(scale * (q[t, :, None, :] @ state)[:, 0])
            t += 1
        states.append(state)
    o = torch.stack(outputs) if outputs else v.new_zeros(v.shape, dtype=work)
    final = torch.stack(states) if states else v.new_zeros(0, v.shape[1], k.shape[-1], v.shape[-1], dtype=work)
    return o.to(v.dtype), final
