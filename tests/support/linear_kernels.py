"""Inputs for every variant of linear attention on one device, and what they are compared with."""

from typing import Any, NamedTuple

import torch

from lsys.kernels.linear_attention import linear_attention

DECAYS = ("none", "head", "token", "channel")
VARIANTS = (*DECAYS, *(f"delta {decay}" for decay in DECAYS))
NAMES = ("o", "final state", "dq", "dk", "dv", "d initial", "d decay", "d beta")
# Zero and one token, primes, whole chunks of several sizes and one token more or less, several chunks.
PACKS = [[0, 1, 7, 31, 64, 65, 128, 301, 0], [16, 16], [64], [512, 64], [5] * 9, [0, 0], [], [127, 1, 33]]
# Largest difference from the definition in fp64, relative to 1 + its magnitude, decays and states in fp32 at least.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 4e-4, torch.bfloat16: 4e-2}


class Inputs(NamedTuple):
    """Leaves, and the gradients of the output and of the final state. Decay and beta may be None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    state: torch.Tensor
    log_decay: torch.Tensor | None
    beta: torch.Tensor | None
    do: torch.Tensor
    d_state: torch.Tensor

    @property
    def leaves(self):
        return [x for x in self[:6] if x is not None]

    def exact(self):
        """The same in fp64."""
        every: list[Any] = [x if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in self]
        return Inputs(*every)


def tensors(
    variant, lengths, dtype=torch.float64, *, batch=1, key_heads=2, heads=4, width=8, value_width=6, strength=0.05
):
    """Of sequences of these lengths, of `batch` times one length if there are several."""
    tokens = sum(lengths) // batch
    generator = torch.Generator().manual_seed(tokens + key_heads)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = draw(batch, tokens, key_heads, width), draw(batch, tokens, key_heads, width)
    v, do = draw(batch, tokens, heads, value_width), draw(batch, tokens, heads, value_width)
    # A large initial state, so that its loss would be noticed after many tokens.
    state, d_state = (size * draw(len(lengths), heads, width, value_width) for size in (3, 1))
    decay, beta = variant.split()[-1], None
    if variant.startswith("delta"):  # of unit keys, so that states do not grow
        k, beta = k / k.norm(dim=-1, keepdim=True), 2 * torch.rand(v.shape[:3], generator=generator)
    shape = {"none": None, "head": (heads,), "token": v.shape[:3], "channel": (*v.shape[:3], width)}[decay]
    log_decay = None if shape is None else -draw(*shape).abs() * strength
    kept = [x if x is None else x.to(wide) for x in (state, log_decay, beta)]
    leaves: list[Any] = [x if x is None else x.requires_grad_() for x in (*(x.to(dtype) for x in (q, k, v)), *kept)]
    q, k, v, state, log_decay, beta = leaves
    return Inputs(q, k, v, state, log_decay, beta, do.to(dtype), d_state.to(wide))


def with_gradients(inputs, o, after):
    """Output, final state and the gradients of all leaves."""
    loss = (o * inputs.do).sum() + (after * inputs.d_state).sum()
    return [o.detach(), after.detach(), *torch.autograd.grad(loss, inputs.leaves, materialize_grads=True)]


def run(inputs, **options):
    """`with_gradients` of the kernel."""
    q, k, v, state, log_decay, beta = inputs[:6]
    options = dict(initial_state=state, output_final_state=True) | options
    return with_gradients(inputs, *linear_attention(q, k, v, log_decay, beta, **options))


def error(x, y):
    """The largest difference, relative to 1 + the magnitude of y; infinite if anything is not finite."""
    assert x.shape == y.shape
    difference = ((x.double() - y.double()).abs() / (1 + y.double().abs())).detach().flatten()
    return difference.nan_to_num(torch.inf).max().item() if len(difference) else 0.0


def errors(found, wanted, names=NAMES):
    """`error` of each result, by name."""
    return {name: error(x, y) for name, x, y in zip(names[: len(found)], found, wanted, strict=True)}


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def mixing(q, k, log_decay, beta, backward=False):
    """What token i takes of value j, [H, T, T], and what it takes of the state before all, [H, T, K], of one sequence.

    By products of explicit matrices: of the steps between, each e^g and then, with beta, 1 - beta k k^T. q, k [T, H, K],
    log_decay [T, H, K] or None, beta [T, H] or None. `backward`: of the tokens from i on, in reverse order.
    """
    if backward:
        flipped = [None if x is None else x.flip(0) for x in (q, k, log_decay, beta)]
        weight, start = mixing(*flipped)
        return weight.flip(1, 2), start.flip(1)
    (tokens, heads, width), one = q.shape, torch.eye(q.shape[-1], dtype=q.dtype)
    steps = one.expand(tokens, heads, width, width)
    if log_decay is not None:
        steps = steps * log_decay.exp().unsqueeze(-2)
    if beta is not None:
        steps = (one - beta[..., None, None] * k.unsqueeze(-1) * k.unsqueeze(-2)) @ steps
    written = k if beta is None else beta.unsqueeze(-1) * k
    rows, start = [], []
    for i in range(tokens):
        reader, row = q[i], [q.new_zeros(heads)] * (tokens - 1 - i)
        for j in range(i, -1, -1):  # q_i^T M_i ... M_(j+1)
            row.append((reader * written[j]).sum(-1))
            reader = torch.einsum("hk,hkl->hl", reader, steps[j])
        rows.append(torch.stack(row[::-1], -1))
        start.append(reader)
    if not tokens:
        return q.new_zeros(heads, 0, 0), q.new_zeros(heads, 0, width)
    return torch.stack(rows, 1), torch.stack(start, 1)


def parts(inputs, lengths):
    """Of each sequence q, k, v, log-decay and beta [T, H, ...], keys of all heads and decay of all channels."""
    q, k, v, _, log_decay, beta = inputs[:6]
    group = v.shape[2] // k.shape[2]
    if log_decay is not None:
        each = log_decay.expand(v.shape[:3]) if log_decay.dim() == 1 else log_decay
        each = each if each.dim() == 4 else each.unsqueeze(-1)
        log_decay = each[0].expand(*v.shape[1:3], k.shape[3])
    flat = [q[0].repeat_interleave(group, 1), k[0].repeat_interleave(group, 1), v[0], log_decay]
    flat.append(None if beta is None else beta[0])
    split = [[None] * len(lengths) if x is None else x.split(list(lengths)) for x in flat]
    return list(zip(*split, strict=True))
