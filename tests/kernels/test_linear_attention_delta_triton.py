"""The Triton kernels of the delta rule, interpreted: see `support.interpreter`."""

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from lsys.kernels.linear_attention import segments
from lsys.kernels.linear_attention.chunked.chunks import Tokens
from lsys.kernels.linear_attention.gpu.delta.segments import DeltaTritonSegments
from lsys.kernels.linear_attention.gpu.spans import divide, span_chunks

TOLERANCE = 1e-5  # of fp32, the norm of the difference from the definition in fp64 over the norm
NAMES = ("o", "state", "transition", "dq", "dk", "dv", "d beta", "d initial", "d decay")
PACK = [0, 1, 7, 63, 64, 65]


class Case(NamedTuple):
    lengths: list[int]
    external: list[int]
    decay: str
    key_heads: int = 1
    heads: int = 2
    keys: int = 8
    values: int = 6
    chunk: int | None = 16
    span: int | None = 2
    strength: float = 0.1


CASES = {
    "no state enters": Case(PACK, [], "token", heads=1),
    "some enter": Case(PACK, [0, 1, 3, 5], "token"),
    "all enter, no decay": Case([33, 0, 18], [0, 1, 2], "none", 2, 2, 16, 16),
    "decay per head, spans of one chunk": Case([65, 1], [0], "head", 2, 4, 24, 40, 32, 1),
    "chunks of the default size, blocks of columns": Case([131], [0], "token", 1, 1, 70, 130, None, 1),
    "blocks of keys": Case([40], [0], "token", 1, 1, 150, 10, None, 1),
    "no tokens": Case([0, 0], [1], "token"),
}


def tensors(case):
    """q, k of unit length, v, beta up to 2, states before the segments with external state, log-decay; and gradients of the results."""
    generator = torch.Generator().manual_seed(sum(case.lengths))
    tokens, external, heads = sum(case.lengths), len(case.external), case.heads

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q, k = draw(tokens, case.key_heads, case.keys), draw(tokens, case.key_heads, case.keys)
    v, state = draw(tokens, heads, case.values), draw(external, heads, case.keys, case.values)
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = 2 * torch.rand(tokens, heads, generator=generator)
    shape = {"none": None, "head": (heads,), "token": (tokens, heads)}[case.decay]
    decay = None if shape is None else -case.strength * draw(*shape).abs()
    gradients = (draw(*v.shape), draw(*state.shape), draw(external, heads, case.keys, case.keys))
    return [q, k, v, beta, state, decay], gradients


def run(make, leaves, gradients):
    """The results of both phases and the gradients of the leaves."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in leaves]
    q, k, v, beta, state, decay = leaves
    parts = make(q, k, v, decay, beta)
    maps = parts.segment_map()
    results = parts.apply(maps, parts.intra(), state if len(state) else None), maps.state, maps.transition
    loss = sum((x * g.to(x.dtype)).sum() for x, g in zip(results, gradients, strict=True))
    found = torch.autograd.grad(loss, [x for x in leaves if x is not None], materialize_grads=True)
    return [x.detach() for x in (*results, *found)]


def triton(case):
    def make(*inputs):
        sizes = dict(chunk=case.chunk, span=case.span)
        return DeltaTritonSegments(Tokens(*inputs), case.lengths, case.external, case.keys**-0.5, **sizes)

    return make


def definition(case):
    def make(q, k, v, log_decay, beta):
        return segments(q, k, v, log_decay, beta, case.lengths, case.external, backend="reference")

    return make


def difference(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item() if wanted.numel() else 0.0


def differences(case):
    """Of each result and gradient; and the part of the output that comes from the states before."""
    leaves, gradients = tensors(case)
    exact: list[Any] = [x if x is None else x.double() for x in leaves]
    wanted = run(definition(case), exact, gradients)
    found = run(triton(case), leaves, gradients)
    named = dict(zip(NAMES, map(difference, found, wanted), strict=False))
    fresh = exact[:4] + [torch.zeros_like(exact[4])] + exact[5:]
    return named, difference(run(definition(case), fresh, gradients)[0], wanted[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_are_the_definition(interpreter, name):
    case = CASES[name]
    found, entering = interpreter(differences, case)
    assert all(x < TOLERANCE for x in found.values()), found  # NaN fails, too
    assert entering > 0.1 or not case.external or not sum(case.lengths)  # lost, it would be noticed


def test_strong_decay_is_finite_and_right(interpreter):
    found, _ = interpreter(differences, Case([40, 5], [0], "token", heads=1, strength=50.0))
    # Sums of log-decays are rounded in fp32 before their differences are taken: 2^-24 of 50 x 16 tokens.
    assert all(x < 1e-4 for x in found.values()), found


def output(case, at=None):
    """With token `at` changed."""
    leaves, _ = tensors(case)
    q, k, v, beta, state, decay = leaves
    if at is not None:
        for x in (q, v, beta, decay):
            x[at] *= 0.5
        k[at] = k[at].flip(-1)
    parts = triton(case)(q, k, v, decay, beta)
    return parts.apply(parts.segment_map(), parts.intra(), state)


def changed_tokens(case, at):
    """For each of these tokens, which tokens' outputs a change of it changes."""
    before = output(case)
    return [(output(case, i) != before).flatten(1).any(1) for i in at]


def test_a_token_changes_only_those_from_there_on(interpreter):
    begin, length = 3, 40
    case = Case([begin, length, 5], [1], "token", heads=1)
    at = [begin + i for i in (0, 5, 15, 16, 32, 39)]
    for i, changed in zip(at, interpreter(changed_tokens, case, at), strict=True):
        assert not changed[:i].any() and not changed[begin + length :].any(), i
        assert changed[i : begin + length].all(), i


def test_spans_hold_every_token_once():
    lengths = (0, 1, 7, 64, 65, 130)
    division = divide(lengths, (1, 4), 16, 2, torch.device("cpu"))
    for table in (division.every.table[:, :2], division.every.chunks):
        held = [i for first, count in table.tolist() for i in range(first, first + count)]
        assert held == list(range(sum(lengths)))
    assert division.plan.counts == (1, 2, 3, 5)  # with external state, or of several spans
    assert division.external_plan.counts == (1, 3) and division.entry.tolist() == [0, 1, 1, 1]
    rows = division.every.table[:, 3].tolist()
    assert rows == [0, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert division.external_rows is not None
    assert [rows[i] for i in (0, 4, 5, 6)] == division.external_rows.tolist()
    assert not division.external.whole and division.every.whole


def test_spans_grow_with_the_work():
    assert span_chunks([8192], 64, 16) == 16
    assert span_chunks([262144], 64, 16) == 128


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype=torch.float64), "takes fp32, bf16 and fp16, not torch.float64; backend .chunked. computes it"),
        (dict(channels=True), "no decay per key channel with the delta rule; backend .chunked. computes it"),
        (dict(keys=300), "K and V of 1 to 256, not K = 300, V = 6; backend .chunked. computes it"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(change, message):
    q, v = torch.randn(3, 1, change.get("keys", 8)), torch.randn(3, 2, 6)
    q, v = (x.to(change.get("dtype", torch.float32)) for x in (q, v))
    decay = -torch.ones(3, 2, 8) if "channels" in change else None
    with pytest.raises(ValueError, match=message):
        segments(q, q, v, decay, torch.ones(3, 2), [3], [], backend="triton")
