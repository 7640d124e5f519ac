"""A final loss of one's own."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lsys.config.reports import LOSS


class FocalLoss:
    """Cross-entropy in which hard tokens count more: (1 - p)^2 (-log p), with the probability p of the target (Lin et al., 2017)."""

    def __init__(self, settings: Any) -> None:
        from lsys.model.loss import token_losses  # made where Megatron is ready

        self.token_losses = token_losses

    def __call__(self, output: Any) -> dict[str, Tensor]:
        """The sum over this rank's tokens that count."""
        logits = output.logits()  # [slots, 1, vocab / tensor]
        targets = F.pad(output.targets, (0, len(logits) - len(output.targets)))  # slots behind the tokens are slack
        entropy = self.token_losses(logits, targets[:, None], 0.0, output.tp_group)[0, : len(output.mask)]
        return {LOSS: (entropy * (1 - (-entropy).exp()).square() * output.mask).sum()}
