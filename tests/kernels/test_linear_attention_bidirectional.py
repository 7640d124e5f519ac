import pytest
import torch
from support.comparing import largest
from support.linear_kernels import NAMES, TOLERANCE, VARIANTS, cu, errors, mixing, parts, tensors

from lsys.kernels.linear_attention import linear_attention


def explicit(inputs, lengths):
    """By the whole mixing matrix: what comes from before, from after and, once, from the token itself: o [1, T, H, V]."""
    outputs = [inputs.v[0, :0]]
    for q, k, v, g, beta in parts(inputs, lengths):
        below, above = mixing(q, k, g, beta)[0], mixing(q, k, g, beta, backward=True)[0]
        outputs.append(torch.einsum("hij,jhv->ihv", below.tril() + above.triu(1), v) * q.shape[-1] ** -0.5)
    return torch.cat(outputs)[None]


def with_gradients(inputs, o):
    leaves = [x for x in (*inputs[:3], *inputs[4:6]) if x is not None]
    return [o.detach(), *torch.autograd.grad((o * inputs.do).sum(), leaves)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_both_directions_are_the_mixing_matrix(variant, dtype, key_heads):
    lengths = [0, 1, 7, 40, 17]
    inputs = tensors(variant, lengths, dtype, key_heads=key_heads)
    exact = inputs.exact()
    wanted = with_gradients(exact, explicit(exact, lengths))
    for backend in ("chunked", "reference"):
        q, k, v, _, log_decay, beta = inputs[:6]
        o, nothing = linear_attention(q, k, v, log_decay, beta, cu_seqlens=cu(lengths), causal=False, backend=backend)
        assert nothing is None
        found = errors(with_gradients(inputs, o), wanted, names=("o", *NAMES[2:]))
        assert largest(found.values()) < TOLERANCE[dtype], (backend, found)


def test_a_batch_goes_both_ways():
    q, k, v, _, log_decay, beta = tensors("delta token", [33, 33], batch=2)[:6]
    both, _ = linear_attention(q, k, v, log_decay, beta, causal=False)
    for b in range(2):
        alone, _ = linear_attention(*(x[b : b + 1] for x in (q, k, v, log_decay, beta)), causal=False)
        assert torch.allclose(both[b], alone[0], atol=1e-12)
