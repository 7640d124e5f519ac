"""Links as they are measured, by a clock that messages set forward."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from lsys.bench import link_speeds
from lsys.parallel.comm import SequenceComm
from lsys.parallel.links import NETWORK, NODE


def measure(rank: int, world_size: int, nodes: list[int]) -> dict[str, tuple[float, float]]:
    """Messages take 2 s, long ones 10 s; on rank 1 twice as long."""
    comm, now = SequenceComm(None, node_of_rank=nodes), [0.0]
    real = comm.exchange

    def exchange(send: dict[int, torch.Tensor], receive: dict[int, torch.Tensor]) -> Any:
        is_long = any(each.numel() == link_speeds.LARGE for each in (*send.values(), *receive.values()))
        now[0] += (10.0 if is_long else 2.0) * (2 if rank == 1 else 1)
        return real({k: v[:1] for k, v in send.items()}, {k: v[:1] for k, v in receive.items()})

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    with mock.patch.object(comm, "exchange", exchange), mock.patch.object(link_speeds, "time", clock):
        return {name: (link.latency, link.bandwidth) for name, link in link_speeds.measured_links(comm).items()}


def test_all_ranks_have_the_link_of_its_slower_end(gloo: Any) -> None:
    for links in gloo(3, measure, [0, 0, 1]):
        assert links[NODE] == pytest.approx((4.0, 4 * (1 << 20) / 16.0))
        assert links[NETWORK] == pytest.approx((2.0, 4 * (1 << 20) / 8.0))
