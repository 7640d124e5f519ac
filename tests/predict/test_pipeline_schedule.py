"""The order of passes, and the simulated pipeline, against closed forms."""

import pytest
from support import parity

from lsys.predict.deployment import Deployment
from lsys.predict.kernel_memory import chunk_size
from lsys.predict.schedule import Pass, in_flight, passes
from lsys.predict.timeline import Duration, Timeline


@pytest.mark.parametrize(
    ("stages", "chunks", "micro_batches"), [(1, 1, 3), (2, 1, 4), (4, 1, 2), (4, 1, 8), (2, 2, 4), (4, 3, 8)]
)
def test_every_pass_happens_once_and_forward_first(stages: int, chunks: int, micro_batches: int) -> None:
    for stage in range(stages):
        order = passes(stages, stage, chunks, micro_batches)
        assert len(order) == len({*order}) == 2 * chunks * micro_batches
        for step in order:
            if not step.is_forward:
                assert order.index(step._replace(is_forward=True)) < order.index(step)


def deployment(**changes) -> Deployment:
    config = parity.settings(**changes)
    return Deployment(config, config.parallel.pipeline, gpu=False)


def pipeline(stages: int, virtual: int, micro_batches: int) -> Deployment:
    degrees = dict(parallel__pipeline=stages, parallel__virtual_pipeline=virtual, model__layers=stages * virtual)
    return deployment(**degrees, train__batch_tokens=97 * micro_batches)


def test_micro_batches_in_flight() -> None:
    assert [in_flight(pipeline(4, 1, 8), stage) for stage in range(4)] == [[4], [3], [2], [1]]
    assert in_flight(pipeline(4, 1, 2), 0) == [2]
    assert in_flight(pipeline(2, 2, 4), 0) == [3, 2]  # 2 (P - 1) + (V - 1) P before the first backward pass, and one


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), [(1, 1, 4), (2, 1, 4), (4, 1, 8), (4, 2, 8)])
def test_bubble_is_the_known_one(stages: int, virtual: int, micro_batches: int) -> None:
    """(P - 1) (f + b) / V over m (f + b): Narayanan et al., 2021; without transfers."""
    where = pipeline(stages, virtual, micro_batches)
    durations = [
        {
            (way, chunk): Duration(1.0 if way else 2.0, 1.0, 0.0, 0.0)
            for way in (True, False)
            for chunk in range(virtual)
        }
        for _ in range(stages)
    ]
    makespan = Timeline(where, durations, 0.0).run()
    assert makespan == pytest.approx(3 * (virtual * micro_batches + stages - 1))


def test_cores_are_shared() -> None:
    where = pipeline(2, 1, 4)
    durations = [{(way, 0): Duration(1.0, 1.0, 0.0, 0.0) for way in (True, False)} for _ in range(2)]
    makespan = Timeline(where, durations, 0.0, cores=1).run()
    assert makespan == pytest.approx(16)  # all passes, one after the other


def test_chunks_are_those_of_the_kernels() -> None:
    from lsys.kernels.linear_attention.chunked.blocks import BLOCK
    from lsys.kernels.linear_attention.chunked.grid import chunk_size as real
    from lsys.predict import kernel_memory

    assert BLOCK == kernel_memory.BLOCK
    for lengths in ([1024], [256, 256], [7], [1], [100_000]):
        for widths in ((16, 16), (64, 64), (128, 256), (20, 28)):
            assert chunk_size(lengths, *widths) == real(lengths, *widths)
    assert Pass(True, 0, 0).is_forward
