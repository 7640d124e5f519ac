"""The loss of examples/my_parts, brought by its path, is its definition, and trains alike on any degrees."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import parity, resuming
from train.test_own_parts import DEGREES, check

from lsys.config.messages import FilesError
from lsys.config.reports import LOSS

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
        p = torch.cat(parts, -1)[:, 0, :61].double().softmax(-1).gather(1, targets[:, None])[:, 0]
    return loss, float((mask * (1 - p).square() * -p.log()).sum())


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_is_its_definition(gloo: Any, ranks: int) -> None:
    for found, wanted in gloo(ranks, focal, {"parallel__tensor": ranks}):
        assert found == pytest.approx(wanted, rel=1e-6) and wanted > 10


@pytest.mark.parametrize("case", DEGREES)
def test_the_loss_equals_one_process(gloo: Any, case: str) -> None:
    check(gloo, FOCAL, case)


# ---- what is refused


class Fails:
    def __init__(self, settings: Any) -> None:
        raise OSError("no such table")


def of_an_output(output: Any) -> dict[str, torch.Tensor]:
    """Is named in the place of what makes it."""
    return {LOSS: output.logits().sum()}


def answers(settings: Any) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Fails", "(settings) raised OSError: no such table; "),
        ("of_an_output", "(settings) raised AttributeError: 'Config' object has no attribute 'logits'"),
        ("answers", "(settings) gives {}, which cannot be called; it is called"),
    ],
)  # fmt: skip
def test_a_loss_that_cannot_be_made_is_told_before_a_process_group_starts(name: str, said: str) -> None:
    from lsys.train import run

    others = dict.fromkeys(("check_files", "require_own_folder", "open_baseline", "process_groups"), mock.DEFAULT)
    with mock.patch.multiple(run, **others) as patched, pytest.raises(FilesError) as caught:
        with run.open_run(parity.settings(train__loss=f"{__name__}:{name}")):
            pass
    assert str(caught.value).startswith(f"train.loss: {__name__}:{name}{said}")
    assert str(caught.value).endswith("; it is called with the configuration, and what that gives with each Output")
    assert patched["open_baseline"].called and not patched["process_groups"].called


class Gives:
    """Gives what `found` makes of the logits."""

    found: Any = staticmethod(lambda logits: logits.sum())

    def __init__(self, settings: Any) -> None:
        pass

    def __call__(self, output: Any) -> Any:
        return self.found(output.logits().float().square())


class Unnamed(Gives):
    found = staticmethod(lambda square: {"focal": square.sum()})


class Tokens(Gives):
    found = staticmethod(lambda square: {LOSS: square.sum(), "tokens": square.sum()})


class Vector(Gives):
    found = staticmethod(lambda square: {LOSS: square.sum(2)})


class Number(Gives):
    found = staticmethod(lambda square: {LOSS: float(square.sum())})


class Square(Gives):
    found = staticmethod(lambda square: {LOSS: square.sum()})


WRONG = {
    "Gives": "gave Tensor, and no mapping; it has to give sums over the rank's tokens by these names: loss_metrics/global_avg_loss, "
    "loss_metrics/z_loss; the first always",
    "Unnamed": "gave 'focal'; it has to give",
    "Tokens": "gave 'loss_metrics/global_avg_loss', 'tokens'; it has to give",  # the engine counts them
    "Vector": "gave loss_metrics/global_avg_loss as torch.float32 [97, 1], and no tensor of one number; it has to give",
    "Number": "gave loss_metrics/global_avg_loss as float, and no tensor of one number; it has to give",
}


def refusals(rank: int, world_size: int, folder: str, names: list[str]) -> list[str]:
    said = []
    for name in names:
        changes = {"model__layers": 1, "model__pattern": "S", "train__loss": f"{__name__}:{name}"}
        try:
            resuming.run(rank, world_size, changes, Path(folder), stop=1)
        except FilesError as error:
            said.append(str(error))
    return said


def test_a_loss_that_gives_something_else_is_told(gloo: Any, tmp_path: Path) -> None:
    (found,) = gloo(1, refusals, str(tmp_path), [*WRONG, "Square"])
    for text, (name, said) in zip(found, WRONG.items(), strict=True):
        assert text.startswith(f"train.loss: {__name__}:{name} {said}")
