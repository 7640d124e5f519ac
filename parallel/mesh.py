"""Who is where: the grid of ranks, in Megatron's order (tensor fastest, then context, data, pipeline)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

AXES = ("tensor", "context", "data", "pipeline")


class Degrees(Protocol):
    """Degrees of the axes but data."""

    @property
    def tensor(self) -> int: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def context(self) -> int: ...


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks of a run; the data degree is what is left over.

    Rank order is megatron-core's default "tp-cp-ep-dp-pp" without experts, so the ranks that talk most are neighbours.

    Raises:
        ValueError: the degrees' product does not divide `world_size`.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        product = self.tensor * self.context * self.pipeline
        if self.world_size < 1 or product < 1 or self.world_size % product:
            degrees = f"tensor {self.tensor} x context {self.context} x pipeline {self.pipeline} = {product}"
            raise ValueError(f"{degrees} does not divide {self.world_size} ranks; take a multiple of {product} ranks")

    @classmethod
    def of(cls, degrees: Degrees, world_size: int) -> Mesh:
        """The grid of the `parallel` section of a configuration."""
        return cls(world_size, tensor=degrees.tensor, pipeline=degrees.pipeline, context=degrees.context)

    @property
    def data(self) -> int:
        """Replicas of the model that work on different micro-batches."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    def degree(self, axis: str) -> int:
        if axis not in AXES:
            raise ValueError(f"{axis!r} is no axis of the mesh; there are {', '.join(AXES)}")
        return getattr(self, axis)

    def stride(self, axis: str) -> int:
        """Ranks between two neighbours along the axis."""
        self.degree(axis)
        return math.prod(self.degree(faster) for faster in AXES[: AXES.index(axis)])

    def coordinate(self, rank: int, axis: str) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not among the {self.world_size} ranks 0..{self.world_size - 1}")
        return rank // self.stride(axis) % self.degree(axis)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's place on every axis."""
        return {axis: self.coordinate(rank, axis) for axis in AXES}

    def rank(self, *, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at these coordinates."""
        place = dict(tensor=tensor, context=context, data=data, pipeline=pipeline)
        for axis, coordinate in place.items():
            if not 0 <= coordinate < self.degree(axis):
                raise ValueError(
                    f"{axis} {coordinate} is outside the mesh; {axis} runs from 0 to {self.degree(axis) - 1}"
                )
        return sum(coordinate * self.stride(axis) for axis, coordinate in place.items())

    def peers(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from this one along `axis` only, itself among them, in order of the axis."""
        stride = self.stride(axis)
        first = rank - self.coordinate(rank, axis) * stride
        return [first + index * stride for index in range(self.degree(axis))]

    def nodes(self, ranks_per_node: int) -> list[int]:
        """The node of every rank, for nodes that are filled one after the other."""
        if ranks_per_node < 1:
            raise ValueError(f"{ranks_per_node} ranks per node: there is at least 1")
        return [rank // ranks_per_node for rank in range(self.world_size)]
