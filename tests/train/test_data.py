"""What a run knows of its data beside the batches."""

import math
from pathlib import Path
from typing import Any

import pytest
from support import parity
from support.corpora import write_corpus


def flops_by_rank(rank: int, world_size: int, changes: dict[str, Any], own: list[float]) -> float:
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.data import RunData

    settings = parity.settings(**changes)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        data = RunData(settings, groups, None, None, 0, None)  # type: ignore[arg-type]
        return data.flops_of_all(own[groups.data_rank])


@pytest.mark.parametrize("changes", [{}, {"parallel__context": 2}, {"parallel__tensor": 2}], ids=str)
def test_flops_are_of_all_data_replicas(gloo: Any, changes: dict[str, Any]) -> None:
    """Replicas have other documents, and so other FLOPs; the ranks of one have the same."""
    own = [3e15, 5e15, 7e15, 11e15]
    replicas = 4 // (2 if changes else 1)
    assert gloo(4, flops_by_rank, changes, own) == [sum(own[:replicas])] * 4


def opened(tmp_path: Path, **changes: Any) -> Any:
    """A run's data over two corpora of 200 and 60 tokens, of weights 3 and 1."""
    from lsys.data.corpus import Corpus
    from lsys.train.data import open_data

    paths = [write_corpus(tmp_path / name, [[1] * 20] * count) for name, count in (("a", 10), ("b", 3))]
    corpora = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (3, 1), strict=True)]
    sizes = {"train__batch_tokens": 64, "train__micro_batch_tokens": 16, "train__validate_tokens": 1000}
    settings = parity.settings(**sizes | changes, data__corpora=corpora, data__validation_fraction=0.5)
    found = [Corpus.open(str(path)) for path in paths]
    for corpus, entropy in zip(found, (2.0, 4.0), strict=True):
        corpus.description["bigram_entropy"] = entropy
    return open_data(settings, None, found)  # type: ignore[arg-type]


def test_plans_are_made_for_the_degrees_that_are_set(tmp_path: Path) -> None:
    changes = {"parallel__tensor": 2, "parallel__context": 4, "data__shuffle_window": 3, "data__seed": 5}
    data = opened(tmp_path, **changes, parallel__layout="contiguous")
    for planner, window in ((data.train, 3), (data.held_out, 0)):
        plan = planner.step(1, 0, 1).micro_batches[0]
        assert (planner.context, planner.tensor, planner.kind, len(plan.layout.segments)) == (4, 2, "contiguous", 4)
        assert (planner.window, planner.seed) == (window, 5)
    for ours, held in zip(data.train.stream.documents, data.held_out.stream.documents, strict=True):
        assert len(ours) and len(held) and not {*map(int, ours)} & {*map(int, held)}
    assert data.held_out.limit == data.held_out.stream.epoch_tokens > 0 and data.train.limit is None


def test_validation_takes_what_it_is_given_or_all_of_the_held_out(tmp_path: Path) -> None:
    """In batches of 64 tokens, the last one in part."""
    whole = opened(tmp_path).held_out.stream.epoch_tokens
    assert opened(tmp_path).validation_steps == math.ceil(whole / 64)
    assert opened(tmp_path, train__validate_tokens=65).validation_steps == 2
    assert opened(tmp_path, train__validate_tokens=64).validation_steps == 1
    assert opened(tmp_path, train__validate_tokens=0).held_out is None
    assert opened(tmp_path).bigram_entropy == (3 * 2.0 + 1 * 4.0) / 4
