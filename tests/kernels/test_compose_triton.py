"""Composition of maps in Triton, interpreted (`support.interpreter`), against the definition written out in fp64."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lsys.kernels.linear_attention.gpu import compose as triton_compose
from lsys.kernels.linear_attention.scan import takes_triton

TOLERANCE = 1e-5  # of fp32, the norm of the difference over the norm
COUNTS = {
    "uneven": (3, 0, 1, 7),
    "none": (0, 0),
    "one sequence": (5,),
    "as many as one launch takes": (32, 1),
    "in blocks": (33, 0, 70, 2),
}
FORMS = {"no decay": None, "head": (), "channel": (8,), "matrix": (8, 8)}
HEADS, KEYS, VALUES = 2, 8, 6


def drawn(
    counts: tuple[int, ...], form: tuple[int, ...] | None, keys: int = KEYS, values: int = VALUES
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(counts))
    maps, sequences = sum(counts), len(counts)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    update, initial = normal(maps, HEADS, keys, values), normal(sequences, HEADS, keys, values)
    transition = None if form is None else normal(maps, HEADS, *form)
    if form is not None and len(form) == 2:
        transition = torch.linalg.qr(transition)[0] * 0.97
    elif transition is not None:
        transition = -transition.abs()
    return {
        "update": update,
        "transition": transition,
        "initial": initial,
        "d_before": normal(*update.shape),
        "d_total": normal(*initial.shape),
    }


def operators(transition: torch.Tensor | None, keys: int) -> Any:
    """[n, H, K, K], whatever the form."""
    if transition is None or transition.dim() == 4:
        return transition
    wide = transition.exp() if transition.dim() == 3 else transition.exp()[..., None].expand(*transition.shape, keys)
    return torch.diag_embed(wide)


def defined(counts: tuple[int, ...], case: dict[str, Any], has_initial: bool) -> dict[str, Any]:
    """The recurrence, map after map, and its gradients by autograd, all in fp64."""
    update, initial = (case[name].double().requires_grad_() for name in ("update", "initial"))
    a = operators(None if case["transition"] is None else case["transition"].double(), update.shape[2])
    before, total, row = [], [], 0
    for sequence, count in enumerate(counts):
        state = initial[sequence] if has_initial else torch.zeros_like(initial[sequence])
        for n in range(row, row + count):
            before.append(state)
            state = (state if a is None else a[n] @ state) + update[n]
        total.append(state)
        row += count
    every = torch.stack(before) if before else update * 1
    ends = torch.stack(total)
    loss = (every * case["d_before"]).sum() + (ends * case["d_total"]).sum()
    d_update, d_initial = torch.autograd.grad(loss, (update, initial), allow_unused=True, materialize_grads=True)
    return {"before": every.detach(), "total": ends.detach(), "d_update": d_update, "d_initial": d_initial}


def made(counts: tuple[int, ...], case: dict[str, Any], has_initial: bool) -> dict[str, Any]:
    initial = case["initial"] if has_initial else None
    before, cumulative, total, total_cumulative = triton_compose.forwards(
        case["update"], case["transition"], counts, initial
    )
    d_update, d_initial = triton_compose.backwards(case["d_before"], case["d_total"], case["transition"], counts)
    found = {"before": before, "total": total, "d_update": d_update, "d_initial": d_initial}
    return found | {"cumulative": cumulative, "total_cumulative": total_cumulative}


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert found[name].isfinite().all(), name
        assert (found[name].double() - value).norm() <= TOLERANCE * value.norm(), name


@pytest.mark.parametrize("has_initial", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", COUNTS)
def test_equals_the_recurrence(name: str, form: str, has_initial: bool, interpreter: Any) -> None:
    counts, case = COUNTS[name], drawn(COUNTS[name], FORMS[form])
    wanted = defined(counts, case, has_initial)
    if not has_initial:
        wanted.pop("d_initial")
    assert_equal(interpreter(made, counts, case, has_initial), wanted)


@pytest.mark.parametrize(("keys", "values"), [(16, 40), (33, 16), (20, 70)])
def test_widths_and_blocks_of_columns(keys: int, values: int, interpreter: Any) -> None:
    counts = (2, 36)
    case = drawn(counts, (keys, keys), keys, values)
    assert_equal(interpreter(made, counts, case, True), defined(counts, case, True))


def cumulatives(counts: tuple[int, ...], case: dict[str, Any]) -> list[Any]:
    return [made(counts, case, True)[name] for name in ("cumulative", "total_cumulative")]


@pytest.mark.parametrize("form", ["head", "channel"])
def test_decays_add_up(form: str, interpreter: Any) -> None:
    counts, case = COUNTS["uneven"], drawn(COUNTS["uneven"], FORMS[form])
    cumulative, total = interpreter(cumulatives, counts, case)
    parts = case["transition"].double().split(list(counts))
    wanted = torch.cat([part.cumsum(0) - part for part in parts])
    assert (cumulative - wanted).norm() <= TOLERANCE * wanted.norm()
    assert (total - torch.stack([part.sum(0) for part in parts])).norm() <= TOLERANCE * total.norm()


def launches(counts: tuple[int, ...], case: dict[str, Any]) -> int:
    """Of the kernel of matrices, forwards, where one takes up to 4 maps."""
    count, launch, block = 0, triton_compose._launch, triton_compose.BLOCK

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return launch(*args, **kwargs)

    triton_compose._launch, triton_compose.BLOCK = counted, 4
    triton_compose._cut.cache_clear()
    try:
        triton_compose.forwards(case["update"], case["transition"], counts, None)
    finally:
        triton_compose._launch, triton_compose.BLOCK = launch, block
        triton_compose._cut.cache_clear()
    return count


@pytest.mark.parametrize(("maps", "wanted"), [(1, 1), (4, 1), (5, 4), (16, 4), (17, 7)])
def test_launches_grow_with_the_logarithm(maps: int, wanted: int, interpreter: Any) -> None:
    """One for as many maps as a block has, beyond that three more for each factor of that: of blocks of 32, at most 2 log2(maps)."""
    case = {"update": torch.zeros(maps, 1, 4, 2), "transition": torch.zeros(maps, 1, 4, 4)}
    assert interpreter(launches, (maps,), case) == wanted


def test_what_the_kernels_do_not_take_goes_one_after_the_other() -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    def states(keys: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, 1, keys, 2, dtype=dtype).as_subclass(OnCuda)

    def matrix(keys: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, 1, keys, keys, dtype=dtype).as_subclass(OnCuda)

    half, single, double = torch.bfloat16, torch.float32, torch.float64
    assert takes_triton(states(128, single), matrix(128, single))
    assert takes_triton(states(256, single), None)
    assert not takes_triton(states(129, single), matrix(129, single))
    assert not takes_triton(states(8, double), None)
    assert not takes_triton(states(8, single), matrix(8, half))
    assert not takes_triton(torch.zeros(1, 1, 2, 2), None)
