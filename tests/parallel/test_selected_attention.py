"""Masks that depend on data: chosen call by call, over a layout whose plans are kept."""

from unittest import mock

import pytest
import torch
from support.attention import comm_of, distributed, expected, largest_error, tensors
from support.layouts import layouts
from support.masks import arguments, mask_of, sees

from lsys.parallel.attention import METHODS, route, softmax_attention
from lsys.parallel.attention.select import Blocks
from lsys.parallel.layout import SequenceLayout

LENGTHS, SIZE = [2, 37, 0, 5, 23, 1], 4
HEADS, KV_HEADS = 4, 2
OPTIONS = [{}, {"causal": False}, {"window": 9}, {"shares": True}]


def blocks_of(lengths):
    """The block of each token: int64 [T]."""
    number = {block: at for at, block in enumerate((d, b) for d, n in enumerate(lengths) for b in range(-(-n // SIZE)))}
    return torch.tensor([number[d, p // SIZE] for d, n in enumerate(lengths) for p in range(n)], dtype=torch.int64)


def chosen_by(data):
    """By block of queries, the blocks whose mean keys score highest, half of them: bool [blocks, blocks]."""
    q, k = (x.double().mean(1) for x in data[:2])
    place = blocks_of(LENGTHS)
    means = [
        torch.zeros(int(place.max()) + 1, x.shape[1], dtype=x.dtype).index_reduce(0, place, x, "mean") for x in (q, k)
    ]
    scores = means[0] @ means[1].t()
    return scores >= scores.median(1, keepdim=True).values


def chosen_twice():
    """By the tensors that all calls get, and by others: two choices for one layout."""
    data = tensors(sum(LENGTHS), HEADS, KV_HEADS, torch.float64)
    one, other = chosen_by(data), chosen_by([-data[0], data[1]])
    assert not torch.equal(one, other)
    return one, other


def _errors(rank, world_size):
    """Largest differences from the definition, by case; and that the route was made once for all choices."""
    comm, errors, place = comm_of(rank, world_size), {}, blocks_of(LENGTHS)
    for name, layout in layouts(LENGTHS, world_size).items():
        for options in OPTIONS:
            given = arguments(options, len(LENGTHS))
            for method in METHODS if comm else METHODS[:1]:
                with mock.patch.object(route, "route", wraps=route.route) as made:
                    for number, chosen in enumerate([*chosen_twice(), None]):

                        def attention(q, k, v):
                            select = None if chosen is None else Blocks(SIZE, chosen)
                            return softmax_attention(q, k, v, layout, comm, method=method, select=select, **given)

                        tokens = None if chosen is None else chosen[place[:, None], place]
                        full = expected(LENGTHS, HEADS, KV_HEADS, torch.float64, options, tokens)
                        got = distributed(layout, rank, HEADS, KV_HEADS, torch.float64, attention, again=number == 1)
                        error = largest_error(got, full, layout, rank, torch.float64)
                        errors[f"{name}, {options}, {method}, choice {number}"] = error
                    assert made.call_count <= 1
    return errors


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_call_attends_to_what_it_chose(gloo, world_size):
    for errors in gloo(world_size, _errors):
        wrong = {case: error for case, error in errors.items() if not error < 1e-10}
        assert errors and not wrong, wrong


def _perturbed(rank, world_size):
    comm, place, layout = comm_of(rank, world_size), blocks_of(LENGTHS), SequenceLayout.zigzag(LENGTHS, world_size)
    (chosen, _), data, at = chosen_twice(), tensors(sum(LENGTHS), HEADS, KV_HEADS, torch.float32)[:3], 20
    seen = (sees(LENGTHS, mask_of({}, len(LENGTHS))) & chosen[place[:, None], place])[:, at]
    seen[at] = True  # its own query changed
    outputs = []
    for shift in (0, 2):
        changed = [x.clone() for x in data]
        for x in changed:
            x[at] += shift
        q, k, v = (layout.shard(x, rank) for x in changed)
        outputs.append(softmax_attention(q, k, v, layout, comm, select=Blocks(SIZE, chosen)))
    here = layout.shard(seen, rank)
    assert torch.equal(outputs[0][~here], outputs[1][~here])
    return int(here.sum()), int((outputs[0] != outputs[1]).flatten(1).any(1).sum())


def test_a_token_changes_only_those_that_chose_its_block(gloo):
    for world_size in (1, 2):
        by_rank = gloo(world_size, _perturbed)
        assert all(seen >= reached > 0 for seen, reached in by_rank if seen) and sum(seen for seen, _ in by_rank) > 1


def test_wrong_choices_are_refused():
    layout, (q, k, v, _) = SequenceLayout.contiguous([5, 3], 1), tensors(8, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="2 blocks are chosen; of 4 tokens the layout has 3"):
        softmax_attention(q, k, v, layout, None, select=Blocks(4, torch.ones(2, 2, dtype=torch.bool)))
    for size, chosen in (
        (0, torch.ones(2, 2, dtype=torch.bool)),
        (4, torch.ones(2, 3, dtype=torch.bool)),
        (4, torch.ones(2, 2)),
    ):
        with pytest.raises(ValueError, match="chosen blocks are bool .* on the host, of 1 token or more; got"):
            Blocks(size, chosen)
