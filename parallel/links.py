"""Links between ranks. Needs no torch; `lsys.parallel.gpus` has published figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lsys.parallel.traffic import NETWORK, NODE

__all__ = ["NETWORK", "NODE", "Link", "Links"]


@dataclass(frozen=True)
class Link:
    """What a rank's port to one class of peers does, in each direction at the same time.

    Attributes:
        latency: s from the start of a message to the arrival of its first byte.
        bandwidth: bytes/s.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if not (self.latency >= 0 and self.bandwidth > 0):
            raise ValueError(f"a link has a latency of 0 s or more and a bandwidth above 0; got {self}")


Links = Mapping[str, Link]  # by link class: NODE, NETWORK
