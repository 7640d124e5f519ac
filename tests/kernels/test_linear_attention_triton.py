"""The Triton kernels of linear attention, interpreted: see `support.interpreter`. And what they compile to."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from lsys.kernels.linear_attention import linear_attention, segments
from lsys.kernels.linear_attention.chunked.chunks import Tokens
from lsys.kernels.linear_attention.gpu.segments import TritonSegments

TOLERANCE = 1e-5  # of fp32, the norm of the difference from the definition in fp64 over the norm
NAMES = ("o", "state", "dq", "dk", "dv", "d initial", "d decay", "transition")
PACK = [0, 1, 7, 63, 64, 65, 0]
BENCH = Path(__file__).parents[2] / "bench" / "kernels_sm90.py"


class Case(NamedTuple):
    lengths: list[int]
    external: list[int]
    decay: str
    enters: bool = True  # whether states come from before the segments with external state
    key_heads: int = 1
    heads: int = 2
    keys: int = 12
    values: int = 20
    strength: float = 0.05
    whole: bool = False  # both phases at once
    dtype: torch.dtype = torch.float32


CASES = {
    "no decay, no state enters": Case(PACK, [], "none", enters=False),
    "no decay, some enter": Case([130, *PACK], [0, 1, 3, 6], "none", key_heads=2),
    "no decay, only maps are wanted": Case(PACK, [2, 5], "none", enters=False),
    "decay per head, all enter": Case([70, 129], [0, 1], "head", heads=3, keys=16, values=16),
    "decay per head, at once": Case([70, 0, 65], [0, 1, 2], "head", whole=True),
    "decay per token, no state enters": Case([200, 3], [], "token", enters=False),
    "decay per token, some enter": Case([130, *PACK], [0, 1, 3, 6], "token"),
    "decay per token, only maps are wanted": Case([5, 130], [1], "token", enters=False, heads=1),
    "decay per token, at once": Case(PACK, [0, 1, 2, 3, 4, 5, 6], "token", whole=True),
    "decay per token, blocks of columns": Case([66], [0], "token", heads=1, keys=140, values=150),
    "decay per channel, no state enters": Case([100], [], "channel", enters=False, heads=1),
    "decay per channel, some enter": Case([70, 0, 1, 33, 66], [0, 2, 4], "channel"),
    "decay per channel, at once": Case([66, 20], [0, 1], "channel", whole=True, heads=1, keys=20, values=10),
    "decay per channel, blocks of columns": Case([17], [0], "channel", heads=1, keys=140, values=150),
    "no tokens": Case([0, 0], [1], "token"),
    "no segments": Case([], [], "channel", enters=False),
}


def tensors(case):
    """q, k, v, states before the segments with external state, log-decay; and the gradients of the output, states and transitions."""
    generator = torch.Generator().manual_seed(sum(case.lengths))
    tokens, external, heads = sum(case.lengths), len(case.external), case.heads

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q, k = draw(tokens, case.key_heads, case.keys), draw(tokens, case.key_heads, case.keys)
    v, state = draw(tokens, heads, case.values), 3 * draw(external, heads, case.keys, case.values)
    shapes = {"none": None, "head": (heads,), "token": (tokens, heads), "channel": (tokens, heads, case.keys)}
    shape = shapes[case.decay]
    decay = None if shape is None else -case.strength * draw(*shape).abs()
    form = (external, heads, case.keys) if case.decay == "channel" else (external, heads)
    q, k, v = (x.to(case.dtype) for x in (q, k, v))
    return [q, k, v, state if case.enters else None, decay], (draw(*v.shape), draw(*state.shape), draw(*form))


def run(case, make, leaves, gradients):
    """Output, states after the segments with external state, the leaves' gradients and, of two phases, the transitions."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in leaves]
    q, k, v, state, decay = leaves
    parts = make(q, k, v, decay)
    results: tuple[Any, ...]
    if case.whole and isinstance(parts, TritonSegments):
        results = parts.whole(state, True)
        maps = None
    else:
        maps = parts.segment_map()
        results = parts.apply(maps, parts.intra(), state), maps.state
        if case.whole:
            results = results[0], after(maps, state)
    loss: Any = sum((x * g.to(x.dtype)).sum() for x, g in zip(results, gradients, strict=False))
    transition = None if maps is None or case.whole else maps.transition
    if transition is not None:
        loss = loss + (transition * gradients[2].to(transition.dtype)).sum()
    found = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None], materialize_grads=True))
    each = [None if x is None else next(found) for x in leaves]
    return [*results, *each, transition]


def after(maps, state):
    from lsys.kernels.linear_attention.transition import carry

    return maps.state + carry(maps.transition, state)


def with_triton(case):
    def make(q, k, v, decay):
        tokens = Tokens(q, k, v, decay, None)
        return TritonSegments(tokens, case.lengths, case.external, case.keys**-0.5, span=1)

    return make


def definition(case):
    def make(q, k, v, decay):
        return segments(q, k, v, decay, None, case.lengths, case.external, backend="reference")

    return make


def difference(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item() if wanted.numel() else 0.0


def differences(case):
    """Of each result and gradient; and the part of the output that comes from the states before."""
    leaves, gradients = tensors(case)
    exact: list[Any] = [x if x is None else x.double() for x in leaves]
    wanted = run(case, definition(case), exact, gradients)
    found = run(case, with_triton(case), leaves, gradients)
    assert [x is None for x in found] == [x is None for x in wanted]
    assert all(x is None or x.shape == y.shape for x, y in zip(found, wanted, strict=True))
    named = {name: difference(x, y) for name, x, y in zip(NAMES, found, wanted, strict=True) if x is not None}
    if not case.enters:
        return named, None
    fresh = [torch.zeros_like(x) if i == 3 else x for i, x in enumerate(exact)]
    return named, difference(run(case, definition(case), fresh, gradients)[0], wanted[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_are_the_definition(interpreter, name):
    found, entering = interpreter(differences, CASES[name])
    assert all(x < TOLERANCE for x in found.values()), found  # NaN, of what no kernel wrote, fails too
    assert entering is None or entering > 0.1 or not sum(CASES[name].lengths)  # lost, it would be noticed


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_strong_decay_is_finite_and_right(interpreter, decay):
    found, _ = interpreter(differences, Case([70, 5], [0], decay, heads=1, strength=50.0))
    found.pop("transition")  # log-decays of which nothing is left are not counted in full
    # Sums of log-decays are rounded in fp32 before their differences are taken: 2^-24 of 50 x 64 tokens.
    assert all(x < 2e-4 for x in found.values()), found


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_half_precision_is_near(interpreter, decay):
    case = Case([70, 5], [0], decay, heads=1, keys=16, values=16, dtype=torch.float16)
    found, _ = interpreter(differences, case)
    assert all(x < 5e-3 for x in found.values()), found


def output(case, at=None):
    """With token `at` changed."""
    leaves, _ = tensors(case)
    q, k, v, state, decay = leaves
    if at is not None:
        for x in (q, k, v, *([] if decay is None else [decay])):
            x[at] *= 0.5
    parts = with_triton(case)(q, k, v, decay)
    return parts.apply(parts.segment_map(), parts.intra(), state)


def changed_tokens(case, at):
    """For each of these tokens, which tokens' outputs a change of it changes."""
    before = output(case)
    return [(output(case, i) != before).flatten(1).any(1) for i in at]


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_a_token_changes_only_those_from_there_on(interpreter, decay):
    begin, length = 3, 70
    case = Case([begin, length, 5], [1], decay, heads=1)
    at = [begin + i for i in (0, 5, 16, 63, 64, 69)]
    for i, changed in zip(at, interpreter(changed_tokens, case, at), strict=True):
        assert not changed[:i].any() and not changed[begin + length :].any(), i
        assert changed[i : begin + length].all(), i


def public(batch, cu_seqlens):
    """The public function by Triton, and by the definition."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 70, heads, 8, generator=generator) for heads in (1, 1, 2))
    decay = -torch.rand(batch, 70, 2, generator=generator)
    options = dict(cu_seqlens=cu_seqlens, output_final_state=True)
    both = [linear_attention(q, k, v, decay, **options, backend=backend) for backend in ("triton", "reference")]
    directions = [
        linear_attention(q, k, v, decay, cu_seqlens=cu_seqlens, causal=False, backend=backend)[0]
        for backend in ("triton", "reference")
    ]
    return [*zip(*both, strict=True), directions]


@pytest.mark.parametrize("batch, cu_seqlens", [(2, None), (1, torch.tensor([0, 1, 1, 70]))])
def test_the_backend_of_the_public_function(interpreter, batch, cu_seqlens):
    for found, wanted in interpreter(public, batch, cu_seqlens):
        assert difference(found, wanted.double()) < TOLERANCE


def long_layout():
    """Spans of the default size on a long sequence, of nothing but shapes."""
    from lsys.kernels.linear_attention.gpu.scan import segment_table

    q = torch.zeros(5000, 1, 1)
    parts = TritonSegments(Tokens(q, q, q, None, None), [5000], [0], 1.0)
    return parts.passes.division.plan.counts, segment_table((2, 0, 3), q.device).tolist()


def test_spans_are_long(interpreter):
    counts, table = interpreter(long_layout)
    assert counts == (5,)  # of 1024 tokens
    assert table == [[0, 2], [2, 0], [2, 3]]


def refused(dtype=torch.float32, keys=8, channels=False):
    q, v = torch.zeros(1, 3, 1, keys, dtype=dtype), torch.zeros(1, 3, 2, 6, dtype=dtype)
    decay, beta = (torch.zeros(1, 3, 2, 8), torch.ones(1, 3, 2)) if channels else (None, None)
    with pytest.raises(ValueError, match="backend 'triton' .*; backend 'chunked' computes it") as error:
        linear_attention(q, q, v, decay, beta, backend="triton")
    return str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.float64,), "takes fp32, bf16 and fp16, not torch.float64"),
        ((torch.float32, 300), "takes K and V of 1 to 256, not K = 300, V = 6"),
        ((torch.float32, 8, True), "has no decay per key channel with the delta rule"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(interpreter, arguments, message):
    assert message in interpreter(refused, *arguments)


def test_without_a_gpu_the_backend_is_refused():
    assert "runs on CUDA, and on CPU only interpreted, with TRITON_INTERPRET=1 set before the start" in refused()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["no decay", "decay per token", "decay per channel"])
def test_kernels_compile_for_sm90_without_spills_and_with_tensor_cores(variant):
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "ptxas-blackwell").exists():
        pytest.skip("this Triton has no ptxas that reads its PTX")
    command = [sys.executable, str(BENCH), "--family", f"linear attention, {variant}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    assert any("pass_kernel" in row[0] for row in rows)
    for name, _, _, _, _, _, stores, loads, _, wgmma, *_ in rows:
        assert stores == loads == "0", name
        assert int(wgmma) > 0 or "scan" in name, name


def misused(is_delta):
    """What each wrong use says; then right gradients of a call that others went wrong on, and of a fresh one."""
    draw = torch.Generator().manual_seed(1)
    leaves = [torch.randn(70, 1, 12, generator=draw) for _ in range(3)]
    leaves[1] = torch.nn.functional.normalize(leaves[1], dim=-1)
    state = torch.randn(1, 1, 12, 12, generator=draw)

    def call():
        q, k, v, s = (x.clone().requires_grad_() for x in (*leaves, state))
        beta = torch.full((70, 1), 0.5) if is_delta else None
        return segments(q, k, v, None, beta, [70], [0], backend="triton"), [q, k, v], s

    def said(function):
        try:
            function()
        except RuntimeError as error:
            return str(error)
        return "nothing"

    found = {}
    parts, tokens, s = call()
    maps = parts.segment_map()
    found["apply first"] = said(lambda: parts.apply(maps, torch.zeros(70, 1, 12), s))
    intra = parts.intra()
    found["intra twice"] = said(parts.intra)
    o = parts.apply(maps, intra, s)
    found["apply twice"] = said(lambda: parts.apply(maps, intra, s))
    torch.autograd.grad(o.sum(), s, retain_graph=True)  # ends early: what it leaves is no other pass's
    found["intra alone"] = said(lambda: torch.autograd.grad(intra.sum(), tokens, retain_graph=True))
    again = torch.autograd.grad(o.sum(), tokens, retain_graph=True)
    twice = torch.autograd.grad(o.sum(), tokens)
    parts, tokens, s = call()
    right = torch.autograd.grad(parts.apply(parts.segment_map(), parts.intra(), s).sum(), tokens)
    return found, all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(again, twice, right, strict=True))


@pytest.mark.parametrize("is_delta", [False, True], ids=["without beta", "delta rule"])
def test_wrong_orders_are_refused(interpreter, is_delta):
    """As in chunks (test_linear_attention_handover.py): they gave silently wrong gradients."""
    found, is_right = interpreter(misused, is_delta)
    assert is_right
    assert "`apply` comes after nothing, but it goes on from `intra`" in found["apply first"]
    assert "`intra` comes after `intra`, but it goes on from nothing" in found["intra twice"]
    assert "`apply` comes after `apply`, but it goes on from `intra`" in found["apply twice"]
    assert "what `intra` gives has a gradient that is not of the output of `apply`" in found["intra alone"]
