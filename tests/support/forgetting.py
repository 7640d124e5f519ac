"""Gates of which some forget everything, beside mild ones: in fp32 by any backend, and the recurrence in fp64."""

from functools import cache
from typing import Any

import torch

from lsys.kernels.linear_attention import linear_attention, segments
from lsys.kernels.linear_attention.recurrence import recurrence
from lsys.kernels.linear_attention.transition import carry
from support.linear_kernels import NAMES, cu, tensors

VALUES = (-30.0, -1e2, -1e4, -3e38)  # one a head
TOLERANCE = 2e-6  # of fp32: the largest difference over the largest magnitude, of each sequence and head


def forget(log_decay: torch.Tensor, lengths: Any) -> torch.Tensor:
    """[H], [T, H] or [T, H, K] with VALUES in its heads: in half of the first sequence's tokens, in each eighth of the second's, in four of others'."""
    found, generator = log_decay.detach().clone(), torch.Generator().manual_seed(len(log_decay))
    if found.dim() == 1:  # the first stays mild: by it the gradients of decays are measured
        return torch.cat([found[:1], found.new_tensor(VALUES[1:])])
    for head, value in enumerate(VALUES):
        for number, part in enumerate(found[:, head].split(list(lengths))):
            some = (len(part) // 2, len(part) // 8, 4)[min(number, 2)]
            for column in part.unsqueeze(-1).flatten(1).T:  # of each channel other tokens
                column[torch.randperm(len(part), generator=generator)[:some]] = value
    return found


def leaves_of(variant: str, lengths: Any) -> tuple[list[Any], tuple[torch.Tensor, ...]]:
    """q, k [T, 4, 8], v, log-decay, beta, initial states in fp32; and the gradients of the output and final states."""
    q, k, v, state, log_decay, beta, do, d_state = tensors(
        variant, list(lengths), torch.float32, key_heads=4, strength=0.3
    )
    log_decay = log_decay if log_decay.dim() == 1 else log_decay[0]
    # States as large as what tokens write, so that errors in either show.
    flat = [q[0], k[0], v[0], forget(log_decay, lengths), None if beta is None else beta[0] / 2, state / 3]
    return flat, (do[0], d_state)


def whole(backend: str, lengths: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    of_batch = [x if x is None or x.dim() == 1 else x[None] for x in (q, k, v, g, beta)]
    options = dict(initial_state=state, output_final_state=True, cu_seqlens=cu(lengths), backend=backend)
    o, after = linear_attention(*of_batch, **options)  # type: ignore[arg-type]
    return o[0], after


def two_phases(backend: str, lengths: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    parts = segments(q, k, v, g, beta, lengths, range(len(lengths)), backend=backend)
    maps = parts.segment_map()
    return parts.apply(maps, parts.intra(), state), maps.state + carry(maps.transition, state)


def steps(backend: str, lengths: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    """Token by token, as in decoding; of one sequence."""
    found = []
    for t in range(len(q)):
        one = [x if x is None or x.dim() == 1 else x[t : t + 1] for x in (q, k, v, g, beta)]
        step: Any = (*one, state)
        o, state = whole(backend, [1], *step)
        found.append(o)
    return torch.cat(found), state


def exact(backend: str, lengths: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    return recurrence(q, k, v, g, beta, lengths, q.shape[-1] ** -0.5, state)


def results(way: Any, backend: str, lengths: Any, variant: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output, final states, and the gradients of all leaves."""
    leaves, given = leaves_of(variant, lengths)
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in leaves]
    found = way(backend, lengths, *leaves)
    loss = sum((x * d.to(dtype)).sum() for x, d in zip(found, given, strict=True))
    return [*(x.detach() for x in found), *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


@cache
def by_recurrence(lengths: tuple[int, ...], variant: str) -> list[torch.Tensor]:
    return results(exact, "reference", lengths, variant, torch.float64)


def worst(way: Any, backend: str, variant: str, lengths: Any) -> dict[str, float]:
    """`off` of one process."""
    return off(results(way, backend, lengths, variant, torch.float32), variant, lengths)


def off(found: list[torch.Tensor], variant: str, lengths: Any) -> dict[str, float]:
    """By name, the largest difference from the recurrence in fp64 over the largest magnitude, of each sequence and head; NaN is infinite."""
    wanted = by_recurrence(tuple(lengths), variant)
    order = ["o", "final state", "dq", "dk", "dv", "d decay", *["d beta"] * ("delta" in variant), "d initial"]
    assert {*order} <= {*NAMES}
    errors = {}
    for name, x, y in zip(order, found, wanted, strict=True):
        difference = (x.double() - y).abs().nan_to_num(torch.inf)
        if y.dim() == 1:  # of all tokens; a head that forgets everything has none
            errors[name] = float(difference.max() / y.abs().max())
            continue
        rows = [1] * len(lengths) if "state" in name or "initial" in name else list(lengths)
        each = [
            (d.transpose(0, 1).flatten(1).amax(1), s.abs().transpose(0, 1).flatten(1).amax(1))
            for d, s in zip(difference.split(rows), y.split(rows), strict=True)
        ]
        errors[name] = max(float((d / s.clamp(min=1e-3 * float(y.abs().max()))).max()) for d, s in each)
    return errors


def wrong(way: str, backend: str, variant: str, lengths: Any) -> dict[str, float]:
    """Of `worst`, what is not within TOLERANCE; `way` by its name here."""
    return {name: e for name, e in worst(globals()[way], backend, variant, lengths).items() if not e < TOLERANCE}
