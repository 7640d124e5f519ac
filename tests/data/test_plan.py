"""Plans: pure functions of the step, the same tokens for any number of ranks, constant slots."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.parity import RandomDocuments

from lsys.runtime import install_megatron

install_megatron()
from lsys.data.plan import Planner  # noqa: E402  (imports megatron)

STREAM: Any = RandomDocuments(61)
CPU = torch.device("cpu")


def planner(**changes: Any) -> Planner:
    return Planner(STREAM, **{"batch_tokens": 4 * 97, "micro_batch_tokens": 97, **changes})


def test_a_step_is_the_next_tokens_of_the_stream() -> None:
    plan = planner().step(2)
    tokens = torch.cat([m.tokens for m in plan.micro_batches])
    assert tokens.tolist() == STREAM.tokens[2 * 388 : 3 * 388].tolist()


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_share_a_step_without_overlap(replicas: int) -> None:
    whole = [m.tokens.tolist() for m in planner().step(3).micro_batches]
    parts = [planner().step(3, r, replicas).micro_batches for r in range(replicas)]
    assert [m.tokens.tolist() for part in parts for m in part] == whole


@given(
    context=st.integers(1, 5),
    tensor=st.integers(1, 4),
    kind=st.sampled_from(["zigzag", "contiguous"]),
    step=st.integers(0, 4),
)
def test_ranks_hold_each_token_once_in_constant_slots(context: int, tensor: int, kind: str, step: int) -> None:
    made = planner(context=context, tensor=tensor, kind=kind)
    for micro_batch in made.step(step).micro_batches:
        batches = [micro_batch.on_rank(rank, CPU) for rank in range(context)]
        assert {batch.slots for batch in batches} == {made.slots}
        assert made.slots % tensor == 0
        assert all(0 <= micro_batch.slack(rank) <= tensor for rank in range(context))
        held = [len(batch.loss_mask) for batch in batches]
        targets = micro_batch.layout.unshard([b.targets[:n] for b, n in zip(batches, held, strict=True)])
        assert torch.equal(targets, micro_batch.targets)
        mask = micro_batch.layout.unshard([batch.loss_mask for batch in batches])
        assert torch.equal(mask, micro_batch.loss_mask)
        assert all((b.tokens[n:] == 0).all() for b, n in zip(batches, held, strict=True))


def test_limit_masks_what_comes_after() -> None:
    masks = torch.cat([m.loss_mask for m in planner(limit=150).step(0).micro_batches])
    free = torch.cat([m.loss_mask for m in planner().step(0).micro_batches])
    assert torch.equal(masks[:150], free[:150]) and masks[150:].sum() == 0 and free[150:].sum() > 0


def test_a_shuffle_window_takes_each_micro_batch_once() -> None:
    def starts(window: int) -> list[int]:
        made = planner(window=window, seed=3)
        return [
            int(m.tokens[0]) * 100000 + int(m.tokens[1:].sum()) for s in range(3) for m in made.step(s).micro_batches
        ]

    plain, mixed = starts(0), starts(6)
    assert plain != mixed
    for begin in (0, 6):  # each window holds what the stream holds there
        assert sorted(plain[begin : begin + 6]) == sorted(mixed[begin : begin + 6])
    assert mixed == starts(6)
