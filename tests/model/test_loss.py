"""The vocabulary-parallel losses against plain PyTorch, with gradients."""

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
