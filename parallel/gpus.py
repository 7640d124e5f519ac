"""GPUs and what joins them, by the data sheets of their vendors. Needs no torch.

docs/predictor.md has the sources, and says what is not published and therefore assumed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lsys.parallel.links import NETWORK, NODE, Link, Links


@dataclass(frozen=True)
class Gpu:
    """One GPU: what torch takes for a device.

    Attributes:
        bf16, fp32: dense peaks in FLOP/s: bf16 with fp32 accumulation, fp32 without TF32. Where a sheet states bf16 with 2:4 sparsity,
            half of it.
        memory: bytes. bandwidth: of its memory, bytes/s.
        node, network: its port to the others of a node, and to those of other nodes.
    """

    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    node: Link
    network: Link

    @property
    def peaks(self) -> dict[str, float]:
        """By `train.precision`."""
        return {"bf16": self.bf16, "fp32": self.fp32}

    @property
    def links(self) -> Links:
        return {NODE: self.node, NETWORK: self.network}


# Latency of a step of a ring: NCCL 2.21's own model, src/graph/tuning.cc, hwLat, ring with the Simple protocol (before 2.12: 9.6 us for a network).
def _fabric(bandwidth: float) -> Link:
    """NVLink, or Infinity Fabric, whose latency is taken to be the same."""
    return Link(3.4e-6, bandwidth)


def _pcie(bandwidth: float) -> Link:
    return Link(5.7e-6, bandwidth)


def _network(gigabits: float) -> Link:
    return Link(14e-6, gigabits * 1e9 / 8)


# The first name that is a word of torch's device name counts. Bandwidths of links are of one direction.
GPUS: dict[str, Gpu] = {
    "GB200": Gpu(2500e12, 80e12, 186e9, 8.0e12, _fabric(900e9), _network(400)),  # GB200 NVL72: 360 PFLOPS sparse / 72
    "B200": Gpu(2250e12, 75e12, 180e9, 7.7e12, _fabric(900e9), _network(400)),  # HGX B200: 36 PFLOPS sparse / 8
    "GH200": Gpu(989e12, 67e12, 96e9, 4.0e12, _fabric(450e9), _network(400)),
    "H200 NVL": Gpu(835e12, 60e12, 141e9, 4.8e12, _pcie(64e9), _network(200)),
    "H200": Gpu(989e12, 67e12, 141e9, 4.8e12, _fabric(450e9), _network(400)),
    "H100 PCIe": Gpu(756e12, 51e12, 80e9, 2.0e12, _pcie(64e9), _network(200)),
    "H100 NVL": Gpu(835e12, 60e12, 94e9, 3.9e12, _pcie(64e9), _network(200)),
    "H100": Gpu(989e12, 67e12, 80e9, 3.35e12, _fabric(450e9), _network(400)),  # SXM5: torch names it "H100 80GB HBM3"
    "H20": Gpu(148e12, 44e12, 96e9, 4.0e12, _fabric(450e9), _network(400)),
    "A100": Gpu(312e12, 19.5e12, 80e9, 2.039e12, _fabric(300e9), _network(200)),  # peaks: SXM4 and PCIe
    "A800": Gpu(312e12, 19.5e12, 80e9, 2.039e12, _fabric(200e9), _network(200)),
    "A40": Gpu(149.7e12, 37.4e12, 48e9, 0.696e12, _pcie(32e9), _network(100)),
    "A30": Gpu(165e12, 10.3e12, 24e9, 0.933e12, _pcie(32e9), _network(100)),
    "A10G": Gpu(70e12, 35e12, 24e9, 0.6e12, _pcie(32e9), _network(100)),
    "A10": Gpu(125e12, 31.2e12, 24e9, 0.6e12, _pcie(32e9), _network(100)),
    "L40S": Gpu(362e12, 91.6e12, 48e9, 0.864e12, _pcie(32e9), _network(100)),
    "L40": Gpu(181e12, 90.5e12, 48e9, 0.864e12, _pcie(32e9), _network(100)),
    "L4": Gpu(121e12, 30.3e12, 24e9, 0.3e12, _pcie(32e9), _network(100)),
    "RTX A6000": Gpu(154.8e12, 38.7e12, 48e9, 0.768e12, _pcie(32e9), _network(100)),
    "RTX 4090": Gpu(165.2e12, 82.6e12, 24e9, 1.008e12, _pcie(32e9), _network(100)),
    "RTX 3090": Gpu(71e12, 35.6e12, 24e9, 0.936e12, _pcie(32e9), _network(100)),
    # fp32 of AMD's with matrix instructions.
    "MI325X": Gpu(1307.4e12, 163.4e12, 256e9, 6.0e12, _fabric(448e9), _network(400)),
    "MI300X": Gpu(1307.4e12, 163.4e12, 192e9, 5.3e12, _fabric(448e9), _network(400)),
    "MI250X": Gpu(191.5e12, 47.9e12, 64e9, 1.6e12, _fabric(200e9), _network(100)),  # one of its two dies, a device each
}


def of_device(name: str) -> Gpu | None:
    """The GPU that torch calls `name`, such as "NVIDIA H100 80GB HBM3"; None: it is not in the table."""
    if re.search(r"\bMIG\b", name):
        return None  # a part of one
    other = r"(?!-\d| (Ti|D|SUPER|Laptop|Max-Q)\b)"  # these are cards of their own, such as H20-3e, with other figures
    return next((gpu for key, gpu in GPUS.items() if re.search(rf"\b{key}\b{other}", name, re.IGNORECASE)), None)


def of_word(word: str) -> Gpu | None:
    """The GPU whose name this is without blanks and in small letters, such as `h100` or `rtx4090`; None: it is not in the table."""
    return next((gpu for key, gpu in GPUS.items() if key.replace(" ", "").lower() == word), None)


def words() -> list[str]:
    """All names as `of_word` takes them."""
    return [key.replace(" ", "").lower() for key in GPUS]
