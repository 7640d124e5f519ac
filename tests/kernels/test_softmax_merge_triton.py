"""Merging partial results in one kernel, interpreted (`support.interpreter`), against softmax over all keys in fp64."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lsys.kernels.softmax_attention import empty_result, merge_triton

TOLERANCE = 1e-5
HEADS, WIDTH, KEYS = 3, 6, 10


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o [n, H, D] and lse [n, H] of queries [n, H, D] over keys [m, H, D] where `sees` [n, m]; 0 and -inf where a query sees none."""
    scores = torch.einsum("nhd,mhd->nhm", q, k).masked_fill(~sees[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("nhm,mhd->nhd", (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp(), v), lse


def drawn(queries: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(n, HEADS, WIDTH, generator=generator, dtype=torch.float64) for n in (queries, KEYS, KEYS))
    return 3 * q, k, v, torch.rand(queries, KEYS, generator=generator) < 0.4


def merged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor, scattered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """By three parts of the keys, each to some of the queries in their own order; heads one after the other, as views."""
    o, lse = empty_result(q.float())
    order = torch.randperm(len(q), generator=torch.Generator().manual_seed(1)) if scattered else torch.arange(len(q))
    for keys in (slice(0, 4), slice(4, 5), slice(5, KEYS)):
        for rows in (order[:7], order[7:]):
            part, part_lse = softmax(q[rows], k[keys], v[keys], sees[rows][:, keys])
            where = (
                rows if scattered else slice(int(rows[0]) if len(rows) else 0, int(rows[-1]) + 1 if len(rows) else 0)
            )
            for head in (slice(0, 1), slice(1, HEADS)):
                other_lse = part_lse[:, head].float().t().contiguous().t()  # as flash kernels give it
                merge_triton.merge_rows(o[:, head], lse[:, head], where, part[:, head].float(), other_lse)
    return o, lse


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("queries", [1, 7, 41])
def test_is_softmax_over_all_keys(queries: int, scattered: bool, interpreter: Any) -> None:
    q, k, v, sees = drawn(queries)
    o, lse = interpreter(merged, q, k, v, sees, scattered)
    wanted, wanted_lse = softmax(q, k, v, sees)
    assert (o.double() - wanted).norm() <= TOLERANCE * wanted.norm()
    assert torch.equal(lse.isinf(), wanted_lse.isinf())
    seen = ~wanted_lse.isinf()
    assert (lse.double() - wanted_lse)[seen].norm() <= TOLERANCE * wanted_lse[seen].norm()


def test_rows_that_are_not_merged_stay_as_they_are(interpreter: Any) -> None:
    q, k, v, sees = drawn(20)
    o, lse = interpreter(partly, q, k, v, sees)
    assert (o[:5] == 0).all()
    assert (o[9:] == 0).all()
    assert lse[:5].isneginf().all()
    assert lse[9:].isneginf().all()
    assert lse[5:9].isfinite().any()


def partly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = empty_result(q.float())
    part, part_lse = softmax(q[5:9], k, v, sees[5:9])
    merge_triton.merge_rows(o, lse, slice(5, 9), part.float(), part_lse.float())
    return o, lse
