"""The vocabulary-parallel losses against plain PyTorch, with gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

SLOTS, VOCAB = 9, 24


def loss_and_gradient(
    rank: int, world_size: int, dtype: torch.dtype, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from lsys.config.schema import Parallel
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    logits, targets, weight = problem(dtype)
    with process_groups(Parallel(tensor=world_size), Launch(rank=rank, world_size=world_size)) as groups:
        from lsys.model.loss import token_losses

        shard = logits.chunk(world_size, -1)[rank].clone().requires_grad_()
        losses = token_losses((shard * 1)[:, None], targets[:, None], z_loss, groups.collection.tp)
        (losses * weight).sum().backward()
        assert shard.grad is not None
        return losses.detach(), shard.grad


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(SLOTS, VOCAB, generator=generator)).to(dtype)
    return logits, torch.randint(VOCAB, (SLOTS,), generator=generator), torch.rand(SLOTS, generator=generator)


# A fused cross-entropy that rounds its gradient to bf16 would be wrong by 1e-3 in fp32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_losses_equal_plain_pytorch(gloo, ranks: int, dtype: torch.dtype, tolerance: float, z_loss: float) -> None:
    outcomes = gloo(ranks, loss_and_gradient, dtype, z_loss)
    logits, targets, weight = problem(dtype)
    exact = logits.double().requires_grad_()
    entropy = F.cross_entropy(exact, targets, reduction="none")
    losses = torch.stack((entropy, z_loss * exact.logsumexp(-1).square()))
    (losses * weight).sum().backward()
    for measured, _ in outcomes:
        torch.testing.assert_close(measured.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([g for _, g in outcomes], -1).double()
    assert exact.grad is not None
    assert (gradient - exact.grad).norm() / exact.grad.norm() < tolerance


def chunked(rank: int, world_size: int, z_loss: float, chunk: int) -> tuple[torch.Tensor, ...]:
    """Sums of the chunked loss over 9 slots, 2 of them slack, in fp64; the gradients of this rank's states and vocabulary."""
    from types import SimpleNamespace
    from unittest import mock

    from lsys.config.schema import Parallel
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    states, weight, targets, mask = hidden_problem()
    with process_groups(Parallel(tensor=world_size), Launch(rank=rank, world_size=world_size)) as groups:
        from lsys.model import chunked_loss
        from lsys.model.loss import Output

        part = states.chunk(world_size)[rank].clone().requires_grad_()
        shard = weight.chunk(world_size)[rank].clone().requires_grad_()
        settings: Any = SimpleNamespace(train=SimpleNamespace(z_loss=z_loss))
        unused: Any = None
        with mock.patch.object(chunked_loss, "CHUNK", chunk):
            output = Output(part[:, None], shard, targets, mask, groups.collection.tp, unused, unused, VOCAB)
            found = list(chunked_loss.ChunkedCrossEntropy(settings)(output).values())
            (1.5 * (found[0] + found[1])).backward()
    assert part.grad is not None and shard.grad is not None
    return torch.stack(found).detach(), part.grad, shard.grad


def hidden_problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(VOCAB, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1, 1])  # the tenth slot is slack
    return states, weight, torch.randint(0, VOCAB, (9,), generator=generator), mask


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunk", [4, 100])
def test_the_chunked_loss_equals_plain_pytorch_in_fp64(gloo: Any, ranks: int, chunk: int) -> None:
    states, weight, targets, mask = hidden_problem()
    outcomes = gloo(ranks, chunked, 1e-2, chunk)
    states.requires_grad_()
    weight.requires_grad_()
    logits = (states @ weight.T)[:9]
    entropy = (F.cross_entropy(logits, targets, reduction="none") * mask).sum()
    z_loss = 1e-2 * (logits.logsumexp(-1).square() * mask).sum()
    (1.5 * (entropy + z_loss)).backward()
    for found, _, _ in outcomes:
        torch.testing.assert_close(found, torch.stack((entropy, z_loss)).detach(), rtol=1e-12, atol=0)
    for found, exact in ((1, states.grad), (2, weight.grad)):
        torch.testing.assert_close(torch.cat([outcome[found] for outcome in outcomes]), exact, rtol=1e-10, atol=1e-12)


# ---- the vocabulary's padding

PADDED: dict[str, Any] = dict(
    model__pattern="L", model__layers=1, model__vocab=60, model__tied=False, train__micro_batch_tokens=48,
    train__batch_tokens=96, train__z_loss=1e-2, optimizer__clip=1.0,
)  # fmt: skip
MULTIPLES = (1, 64, 1024)  # of the last, ranks from the second on have padding alone


class EverySquare:
    """A loss of one's own that knows no softmax: mean squares of all lazy logits."""

    def __init__(self, settings: Any) -> None:
        pass

    def __call__(self, output: Any) -> dict[str, torch.Tensor]:
        from lsys.config.reports import LOSS
        from lsys.model.loss import NEVER

        logits = output.logits()[: len(output.mask), 0]
        assert (logits[:, output.held :] == NEVER).all() and (logits[:, : output.held] > -100).all()
        return {LOSS: (logits + 1).square().sum() / logits.numel()}


def padded(rank: int, world_size: int, loss: str) -> list[Any]:
    """Of each multiple: the losses and gradient norms of five steps; the gradients of the embedding and the output weight in the first."""
    from support import parity

    found = []
    for multiple in MULTIPLES:
        changes = PADDED | {"model__vocab_multiple": multiple, "train__loss": loss, "parallel__tensor": world_size}
        outcome = parity.train(rank, world_size, changes)
        tables = [(o[0], data) for key, _, o, data in outcome.pieces if key.startswith(("embedding.", "output_layer."))]
        assert len(tables) == 2
        found.append((outcome.losses, outcome.norms, tables))
    return found


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", ["cross_entropy", "chunked_cross_entropy"])
def test_the_padding_of_the_vocabulary_is_in_no_loss_and_no_gradient(gloo: Any, loss: str, ranks: int) -> None:
    outcomes = gloo(ranks, padded, loss)
    for losses, norms, _ in outcomes[0][1:]:
        assert losses == pytest.approx(outcomes[0][0][0], rel=1e-6)
        assert norms == pytest.approx(outcomes[0][0][1], rel=1e-5)
    for each in outcomes:
        for _, _, tables in each[1:]:
            for first, gradient in tables:
                held = min(max(60 - first, 0), len(gradient))
                assert not gradient[held:].any() and (not held or gradient[:held].any())


def test_lazy_logits_of_an_own_loss_say_what_is_padding_and_have_no_gradient_there(gloo: Any) -> None:
    [found] = gloo(1, padded, f"{__name__}:EverySquare")
    for _, _, tables in found:
        gradient = tables[1][1]
        assert not gradient[60:].any() and gradient[:60].any(1).all()


def initial_embedding(rank: int, world_size: int, rows: int) -> torch.Tensor:
    from unittest import mock

    from lsys.model import parameters

    table: Any = parameters.Piece("embedding.word_embeddings.weight", (rows, 7), (0, 0), torch.empty(rows, 7))
    model: Any = mock.Mock(vocab=61, init_std=0.02, layers=1)
    with mock.patch.object(parameters, "pieces", lambda chunk: [table]):
        parameters.initialise(model, model, seed=0)
    return table.data


def test_the_padding_changes_no_initial_value_of_a_token(gloo: Any) -> None:
    """Of 61 x 7 elements, which are no whole blocks of torch's generator."""
    one, more = (gloo(1, initial_embedding, rows)[0] for rows in (61, 64))
    assert torch.equal(one, more[:61]) and 0.005 < more[61:].std() < 0.04
