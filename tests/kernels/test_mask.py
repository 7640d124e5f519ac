"""What a mask says of itself, against its definition token by token (`support.masks`)."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masks import CYCLE, DEFINITIONS, SHARES, groups, mask_of, sees

from lsys.kernels.mask import CAUSAL, KINDS, Mask, Own, SharedPrefix
from lsys.kernels.softmax_attention import softmax_attention

MASKS: list[dict[str, Any]] = [{}, {"causal": False}, {"window": 1}, {"window": 6}, *SHARES]
LENGTHS = [2, 0, 7, 3, 1, 13, 0, 5, 0]


@pytest.mark.parametrize("options", MASKS)
def test_pairs_and_sights_are_those_of_the_definition(options):
    mask = mask_of(options, len(LENGTHS))
    blocks = [row.split(LENGTHS, 1) for row in sees(LENGTHS, mask).split(LENGTHS)]
    counted = {(sight.document, sight.reader): 0 for sight in mask.sights(LENGTHS)}
    for document, reader, distance in mask.sights(LENGTHS):
        first, stop = mask.readers(document)
        assert first == document <= reader < stop
        counted[document, reader] = mask.visible(distance, distance + LENGTHS[reader], LENGTHS[document])
        i, j = torch.arange(LENGTHS[reader])[:, None], torch.arange(LENGTHS[document])
        low, high = mask.band(distance)
        seen = torch.ones(len(i), j.shape[0], dtype=torch.bool) if low is None else j >= i + low
        assert torch.equal(blocks[reader][document], seen if high is None else seen & (j <= i + high))
    for reader, row in enumerate(blocks):
        for document, block in enumerate(row):
            assert int(block.sum()) == counted.get((document, reader), 0)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 12), st.sampled_from([None, 1, 2, 5, 30]), st.booleans())
def test_visible_pairs_are_counted(first, more, keys, window, causal):
    mask = Mask(causal or window is not None, window)
    pairs = [
        (query, key)
        for query in range(first, first + more)
        for key in range(keys)
        if (not mask.causal or key <= query) and (window is None or key > query - window)
    ]
    assert mask.visible(first, first + more, keys) == len(pairs)


def test_every_kind_has_a_definition_and_masks_in_all_tests():
    """`SHARES` and `CYCLE` are what schedules, messages, bytes and gradients are tested with."""
    used = {type(mask_of(options, sum(CYCLE)).documents) for options in MASKS}
    assert set(KINDS) == set(DEFINITIONS) == used


def test_equal_masks_share_plans():
    assert Mask(True, 5, SharedPrefix((2, 1))) == Mask(True, 5, SharedPrefix((2, 1)))
    assert len({CAUSAL, Mask(), Mask(True, None, Own()), Mask(documents=SharedPrefix((1, 1)))}) == 2
    assert [Mask(window=w).reach() for w in (None, 1, 9)] == [None, 0, 8]


def test_wrong_masks_are_refused():
    for causal, window in ((True, 0), (False, 3)):
        with pytest.raises(ValueError, match=f"1 token or more and causal; got window={window}, causal={causal}"):
            Mask(causal, window)
    with pytest.raises(ValueError, match=r"a group has a prefix at least, .* got groups of \(2, 0\)"):
        SharedPrefix((2, 0))
    with pytest.raises(ValueError, match="2 groups have 5 documents and the pack 4; each document is in one group"):
        Mask(documents=SharedPrefix((2, 3))).sights([1, 2, 3, 4])
    with pytest.raises(ValueError, match="causal=True, window=4 beside Mask.*; give them to the mask"):
        Mask.of(CAUSAL, True, 4)
    x, bounds = torch.zeros(3, 1, 8), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="packed sequences see themselves alone, not SharedPrefix"):
        softmax_attention(x, x, x, cu_seqlens_q=bounds, cu_seqlens_k=bounds, mask=mask_of({"shares": True}, 2))


@dataclass(frozen=True)
class Overlapping(Own):
    """Each document sees all before it, one token later than they begin."""

    def readers(self, document):
        return document, 4

    def origin(self, document, lengths):
        return document


def test_a_document_that_sees_another_follows_it():
    assert Mask(documents=Overlapping()).sights([1, 1, 1, 1])[1] == (0, 1, 1)
    with pytest.raises(
        ValueError, match="document 2 sees document 1, whose 2 tokens begin 1 before it; it must follow"
    ):
        Mask(documents=Overlapping()).sights([1, 2, 1, 1])


def test_groups_cover_all_documents():
    assert [groups(n) for n in (0, 1, 4, 9)] == [(), (1,), (3, 1), (3, 1, 4, 1)]


def test_a_mask_needs_no_torch():
    program = "import sys, lsys.kernels.mask; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_groups_may_be_a_list():
    listed = SharedPrefix([2, 1])  # type: ignore[arg-type]
    assert listed == SharedPrefix((2, 1)) and hash(Mask(documents=listed)) == hash(Mask(documents=SharedPrefix((2, 1))))
