"""The order in which a pipeline stage runs its micro-batches: Megatron's 1F1B and interleaved schedules.

`megatron/core/pipeline_parallel/schedules.py`: stage p of P runs P - 1 - p micro-batches forward, then one forward and one backward
in turns, then the rest backward. With V virtual chunks, micro-batches go in groups of P through one chunk after the other, and
2 (P - 1 - p) + (V - 1) P of these V m passes come before the first backward (Narayanan et al., 2021).
"""

from __future__ import annotations

from typing import NamedTuple

from lsys.predict.deployment import Deployment


class Pass(NamedTuple):
    """One micro-batch through one chunk of a stage."""

    is_forward: bool
    chunk: int
    micro_batch: int


def passes(stages: int, stage: int, chunks: int, micro_batches: int) -> list[Pass]:
    """All passes of a stage in a step, in order."""
    total = chunks * micro_batches
    if stages == 1:
        return [Pass(way, 0, number) for number in range(micro_batches) for way in (True, False)]
    before = stages - 1 - stage if chunks == 1 else 2 * (stages - 1 - stage) + (chunks - 1) * stages
    before = min(before, total)
    forward = [Pass(True, *_place(number, stages, chunks)) for number in range(total)]
    backward = [
        Pass(False, chunks - 1 - chunk, micro)
        for chunk, micro in (_place(number, stages, chunks) for number in range(total))
    ]
    order = forward[:before]
    for number in range(total - before):
        order += [forward[before + number], backward[number]]
    return order + backward[total - before :]


def _place(number: int, stages: int, chunks: int) -> tuple[int, int]:
    """Chunk and micro-batch of a stage's forward pass of this number."""
    if chunks == 1:
        return 0, number
    group, inside = divmod(number, stages * chunks)
    return inside // stages, group * stages + inside % stages


def in_flight(deployment: Deployment, stage: int) -> list[int]:
    """How many micro-batches' backward passes are to come when most forward passes are done, by chunk."""
    counts, most = [0] * deployment.chunks, [0] * deployment.chunks
    for step in passes(deployment.mesh.pipeline, stage, deployment.chunks, deployment.micro_batches):
        counts[step.chunk] += 1 if step.is_forward else -1
        if sum(counts) > sum(most):
            most = counts.copy()
    return most
