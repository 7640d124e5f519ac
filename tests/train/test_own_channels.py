"""A channel mixer of one's own that looks at the token before: it is given documents, slack and its cache, and its halo is planned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from project import test_channels_complete as complete
from support import parity
from support.comparing import largest
from test_generate import TOLERANCE, decode, train_two_steps
from train.test_own_parts import DEGREES, check

SHIFT: dict[str, Any] = {
    "model__channels": ["shift", "none"],
    "model__mixers": {"shift": {"kind": "support.shifting:Shift"}},
}


@pytest.mark.parametrize("case", DEGREES)
def test_it_equals_one_process(gloo: Any, case: str) -> None:
    check(gloo, SHIFT, case)


def test_its_parameters_products_and_bytes_are_exact(gloo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(complete.KINDS, "shift", ("support.shifting:Shift", {}))
    complete.check_parameters(gloo, "shift")
    complete.check_bytes(gloo, "shift")


def defined(rank: int, world_size: int) -> tuple[float, float]:
    """Differences of the output and of the input's gradient from the formula, document by document, in fp64."""
    from lsys.runtime import install_megatron

    install_megatron()
    from model.test_mixers import LENGTHS, packed_of

    from lsys.mixers.registry import module_class
    from lsys.model.megatron_config import transformer_config
    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    settings = parity.settings(**SHIFT)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        card = settings.model.channel_cards["shift"]
        module = module_class(card)(transformer_config(settings), 1, groups.collection, card=card).double()
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data.normal_(generator=generator)
        tokens = sum(LENGTHS)
        x, weigh = torch.randn(2, tokens + 2, 1, settings.model.hidden, generator=generator, dtype=torch.float64)
        x[tokens:], weigh[tokens:] = torch.nan, 0.0  # slack
        packed = packed_of(SequenceLayout.contiguous(LENGTHS, 1), 0)
        y = module(x.requires_grad_(), packed_seq_params=packed)[0]
        (found,) = torch.autograd.grad((y[:tokens] * weigh[:tokens]).sum(), x)
        rows = []
        for document in x[:tokens, 0].split(LENGTHS):
            h = document @ module.linear_fc1.weight.T
            before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])[: len(h)]
            mixed = (1 - module.mix.weight) * h + module.mix.weight * before
            rows.append(mixed.clamp(min=0).square() @ module.linear_fc2.weight.T)
        wanted = torch.cat(rows)
        (gradient,) = torch.autograd.grad((wanted * weigh[:tokens, 0]).sum(), x)
        pairs = ((y[:tokens, 0], wanted), (found[:tokens], gradient[:tokens]))
        first, second = (float((a - b).norm() / b.norm()) for a, b in pairs)
    return first, second


def test_it_is_its_formula_on_documents_and_slack_does_not_reach_it(gloo: Any) -> None:
    (found,) = gloo(1, defined)
    assert largest(found) < 1e-12


def test_token_by_token_it_is_the_parallel_form(gloo: Any, tmp_path: Path) -> None:
    gloo(2, train_two_steps, SHIFT | {"model__pattern": "LS", "parallel__tensor": 2}, tmp_path)
    document = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(0))
    trust = ("support.shifting:Shift",)
    whole, *_ = gloo(1, decode, tmp_path, document, [40], trust)[0]
    for parts in ([1] * 40, [13, *[1] * 27]):
        found, *_ = gloo(1, decode, tmp_path, document, parts, trust)[0]
        assert (found - whole).abs().max() <= TOLERANCE * whole.abs().max(), parts
