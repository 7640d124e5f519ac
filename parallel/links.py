"""Links between ranks, and published figures of some. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lsys.parallel.traffic import NETWORK, NODE

__all__ = ["HARDWARE", "NETWORK", "NODE", "Link", "Links"]


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

# Latency of a step of a ring: NCCL 2.21's own model, src/graph/tuning.cc, hwLat, ring with the Simple protocol.
_NVLINK_LATENCY, _NETWORK_LATENCY = 3.4e-6, 14e-6

# Peak bandwidth per GPU and direction, from the data sheets of the systems; collectives reach 75 to 90% of it.
HARDWARE: dict[str, Links] = {
    # DGX A100: NVLink 3, 12 links, 600 GB/s both ways; eight 200 Gb/s HDR InfiniBand adapters for eight GPUs.
    "a100": {NODE: Link(_NVLINK_LATENCY, 300e9), NETWORK: Link(_NETWORK_LATENCY, 25e9)},
    # DGX H100: NVLink 4, 18 links, 900 GB/s both ways; eight 400 Gb/s NDR InfiniBand ports for eight GPUs.
    "h100": {NODE: Link(_NVLINK_LATENCY, 450e9), NETWORK: Link(_NETWORK_LATENCY, 50e9)},
    # DGX H200: the interconnects of DGX H100.
    "h200": {NODE: Link(_NVLINK_LATENCY, 450e9), NETWORK: Link(_NETWORK_LATENCY, 50e9)},
    # DGX B200: NVLink 5, 1,800 GB/s both ways; eight 400 Gb/s ports.
    "b200": {NODE: Link(_NVLINK_LATENCY, 900e9), NETWORK: Link(_NETWORK_LATENCY, 50e9)},
}
