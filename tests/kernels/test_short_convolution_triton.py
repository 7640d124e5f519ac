"""The Triton kernels of the short convolution, interpreted (`support.interpreter`), against the definition in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.layouts import layouts

pytest.importorskip("triton")

from lsys.kernels.short_convolution import fused, reference, short_convolution
from lsys.kernels.short_convolution import short_convolution_triton as kernels
from lsys.parallel.convolution import _plan
from lsys.parallel.layout import SequenceLayout

TOLERANCE = 1e-5  # of fp32, the norm of the difference over the norm
PACKS: tuple[list[int], ...] = ([0, 1, 7, 2, 0, 23], [70], [1, 0, 1], [], [0])
WIDTHS = (1, 2, 3, 4)


def drawn(
    lengths: list[int], width: int, channels: int = 3, activation: str | None = "silu", bias: bool = True
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    tokens, count = sum(lengths), len(lengths)
    shapes = {
        "x": (tokens, channels),
        "weight": (channels, width),
        "initial": (count, width - 1, channels),
        "dy": (tokens, channels),
    }
    case: dict[str, Any] = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    case["bias"] = torch.randn(channels, generator=generator) if bias else None
    return case | {"activation": activation, "lengths": lengths}


def defined(case: dict[str, Any], has_initial: bool) -> list[torch.Tensor]:
    """The output and gradients of x, weight, bias and initial, in fp64."""
    leaves = {
        name: case[name].double().requires_grad_()
        for name in ("x", "weight", "bias", "initial")
        if case[name] is not None
    }
    before = leaves["initial"] if has_initial else None
    y = reference.convolution(leaves["x"], leaves["weight"], leaves.get("bias"), case["lengths"], before)
    y = F.silu(y) if case["activation"] else y
    found = torch.autograd.grad(
        y, list(leaves.values()), case["dy"].double(), allow_unused=True, materialize_grads=True
    )
    return [y.detach(), *found][: len(leaves) + has_initial]


def made(case: dict[str, Any], has_initial: bool) -> list[torch.Tensor]:
    leaves = {
        name: case[name].detach().requires_grad_()
        for name in ("x", "weight", "bias", "initial")
        if case[name] is not None
    }
    bounds = torch.tensor([0, *case["lengths"]]).cumsum(0)
    options = {
        "cu_seqlens": bounds,
        "initial": leaves["initial"] if has_initial else None,
        "activation": case["activation"],
    }
    y = short_convolution(leaves["x"], leaves["weight"], leaves.get("bias"), backend="triton", **options)
    found = torch.autograd.grad(y, list(leaves.values()), case["dy"], allow_unused=True, materialize_grads=True)
    return [y.detach(), *found][: len(leaves) + has_initial]


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for place, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert x.shape == y.shape, place
        assert x.isfinite().all(), place
        assert (x.double() - y).norm() <= TOLERANCE * y.norm(), place


def all_made(cases: list[tuple[dict[str, Any], bool]]) -> list[list[torch.Tensor]]:
    return [made(*case) for case in cases]


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_the_definition(width: int, interpreter: Any) -> None:
    cases = [
        (drawn(list(lengths), width, activation=activation, bias=bias), has_initial)
        for lengths in PACKS
        for activation, bias, has_initial in [(None, False, False), ("silu", True, True), ("silu", False, False)]
    ]
    for case, found in zip(cases, interpreter(all_made, cases), strict=True):
        assert_equal(found, defined(*case))


def test_blocks_of_channels_and_of_rows(interpreter: Any) -> None:
    case = drawn([41, 3, 57], 4, channels=2 * kernels.CHANNELS + 5)
    assert_equal(interpreter(made, case, True), defined(case, True))


def strided(case: dict[str, Any]) -> list[torch.Tensor]:
    """With a weight and a bias that are columns of wider tensors."""
    wide = torch.stack([case["weight"], case["weight"] * 5], dim=2)
    beside = torch.stack([case["bias"], case["bias"] * 5], dim=1)
    return made(case | {"weight": wide[..., 0], "bias": beside[:, 0]}, True)


def test_views_are_taken_for_what_they_show(interpreter: Any) -> None:
    case = drawn([9, 14], 4)
    assert_equal(interpreter(strided, case), defined(case, True))


def poisoned(lengths: list[int], at: int) -> torch.Tensor:
    case = drawn(lengths, 4)
    case["x"][at] = torch.nan
    return made(case, True)[0]


def test_a_nan_reaches_its_own_document_and_three_tokens_on(interpreter: Any) -> None:
    lengths, at = [11, 40, 17], 30
    y = interpreter(poisoned, lengths, at)
    assert y[at : at + 4].isnan().all()
    assert torch.cat([y[:at], y[at + 4 :]]).isfinite().all()
    y = interpreter(poisoned, lengths, 50)  # the last of the second document
    assert y[50].isnan().all()
    assert y[51:].isfinite().all()


# ---- across ranks: each rank's tables, and what the others send, by hand


def ranks(lengths: list[int], name: str, world_size: int, width: int) -> dict[str, float]:
    """Errors of y, and of the gradients of x, weight and bias, of all ranks together."""
    case = drawn(lengths, width)
    layout: SequenceLayout = layouts(lengths, world_size)[name]
    y, dx, dw, db = defined(case, False)
    plans = [_plan(layout, rank, width) for rank in range(world_size)]
    parts = [layout.shard(case["x"], rank).contiguous() for rank in range(world_size)]
    sent = [part.index_select(0, plan.rows) for part, plan in zip(parts, plans, strict=True)]
    others = _delivered(sent, [plan.send for plan in plans], [plan.receive for plan in plans])
    outs, founds = [], []
    for rank, plan in enumerate(plans):
        arguments = (parts[rank], others[rank], case["weight"], case["bias"], plan.near, "silu")
        outs.append(kernels.forward(*arguments))
        founds.append(kernels.backward(*arguments, layout.shard(case["dy"], rank).contiguous()))
    theirs = [found.kept[len(plan.sent) :] for found, plan in zip(founds, plans, strict=True)]
    returned = _delivered(theirs, [plan.receive for plan in plans], [plan.send for plan in plans])
    for found, plan, back in zip(founds, plans, returned, strict=True):
        found.x[plan.sent] = found.kept[: len(plan.sent)].index_add(0, plan.place, back)
    together = [layout.unshard(outs), layout.unshard([found.x for found in founds])]
    together += [torch.stack([getattr(found, name) for found in founds]).sum(0) for name in ("weight", "bias")]
    return {
        what: float((x.double() - z).norm() / (1e-30 + z.norm()))
        for what, x, z in zip("y dx dw db".split(), together, (y, dx, dw, db), strict=True)
    }


def _delivered(
    rows: list[torch.Tensor], send: list[dict[int, int]], receive: list[dict[int, int]]
) -> list[torch.Tensor]:
    """What each rank gets, peers in the order of ranks, of what each rank has for its peers in turn."""
    letters = {}
    for rank, counts in enumerate(send):
        for peer, part in zip(counts, rows[rank].split(list(counts.values())), strict=True):
            letters[rank, peer] = part
    empty = rows[0][:0]
    found = [torch.cat([empty, *(letters.pop((peer, rank)) for peer in counts)]) for rank, counts in enumerate(receive)]
    assert not letters
    return found


def all_ranks(cases: list[tuple[Any, ...]]) -> list[dict[str, float]]:
    return [ranks(*case) for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_layout_equals_whole_documents(world_size: int, interpreter: Any) -> None:
    packs = [[0, 1, 7, 2, 0, 23], [2, 19, 5, 3]]
    cases = [
        (lengths, name, world_size, width)
        for lengths in packs
        for width in (2, 4)
        for name in layouts(lengths, world_size)
    ]
    for case, errors in zip(cases, interpreter(all_ranks, cases), strict=True):
        for what, error in errors.items():
            assert error <= TOLERANCE, (case, what)


# ---- who may take them


def test_refusals() -> None:
    x, weight = torch.zeros(4, 3), torch.zeros(3, 9)
    assert fused.refusal(x, weight) == "takes up to 4 taps, not 9"
    assert fused.refusal(x.double(), weight) == "takes fp32, bf16 and fp16, not torch.float64"
    with pytest.raises(
        ValueError, match="backend 'triton' runs on CUDA, and on CPU only interpreted.*'sliding' computes it"
    ):
        short_convolution(x, weight[:, :4], backend="triton")
