"""The loss of examples/my_parts, brought by its path, is its definition, and trains alike on any degrees."""

from typing import Any

import pytest
import torch
from support import parity
from train.test_own_parts import DEGREES, check

FOCAL = {"train__loss": "my_parts.losses:FocalLoss", "train__z_loss": 0.0}


def focal(rank: int, world_size: int, degrees: dict[str, Any]) -> tuple[float, float]:
    """(the loss of a micro-batch, by its definition from all logits)."""
    from lsys.runtime import install_megatron

    install_megatron()
    from model.test_mixers import packed_of

    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    settings = parity.settings(**FOCAL, **degrees)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        engine = Engine(settings, groups)
        tokens, targets = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(24) % 3 != 0).float()
        packed, model = packed_of(SequenceLayout.contiguous([10, 14], 1), 0), engine.chunks[0].module
        with torch.no_grad():
            loss, own = float(model(tokens, targets, packed, mask)), model.logits(tokens, packed).contiguous()
        parts = [torch.empty_like(own) for _ in range(groups.collection.tp.size())]
        torch.distributed.all_gather(parts, own, group=groups.collection.tp)
        p = torch.cat(parts, -1)[:, 0].double().softmax(-1).gather(1, targets[:, None])[:, 0]
    return loss, float((mask * (1 - p).square() * -p.log()).sum())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_is_its_definition(gloo: Any, ranks: int) -> None:
    for found, wanted in gloo(ranks, focal, {"parallel__tensor": ranks}):
        assert found == pytest.approx(wanted, rel=1e-6) and wanted > 10


@pytest.mark.parametrize("case", DEGREES)
def test_the_loss_equals_one_process(gloo: Any, case: str) -> None:
    check(gloo, FOCAL, case)
