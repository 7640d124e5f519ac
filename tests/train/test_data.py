"""What a run knows of its data beside the batches."""

from typing import Any

import pytest
from support import parity


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
