"""The final loss: what the last stage hands to it, and cross-entropy over a vocabulary that is sharded over the tensor ranks."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from lsys.config import Config
from lsys.config.losses import LOSSES
from lsys.config.messages import FilesError, Mistake
from lsys.config.reports import LOSS, Z_LOSS
from lsys.config.user_code import imported
from lsys.model.packed import PackedMicroBatch

NEVER = (
    -1e9
)  # the logit of what is no token: its probability is exactly 0, and products with it are finite in bf16 and fp32


@dataclass(frozen=True)
class Output:
    """The end of the last stage, for one micro-batch on one context rank.

    Attributes:
        hidden: [slots / tensor, 1, hidden], behind the last norm; this tensor rank's slots.
        weight: [vocab / tensor, hidden] of the output layer (the embedding's, where tied); this tensor rank's part of the vocabulary.
        targets: int64 [T_r], ids of the whole vocabulary. mask: fp32 [T_r], 1 where the target counts.
        tp_group: the tensor ranks. packed: documents, and where to report.
        project: hidden -> logits, by the output layer; those of the vocabulary's padding as they come.
        vocab: ids of tokens are below this; rows of the weight from there on, over all tensor ranks, are padding.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    mask: Tensor
    tp_group: Any
    packed: PackedMicroBatch
    project: Callable[[Tensor], Tensor]
    vocab: int

    @property
    def held(self) -> int:
        """Rows of this tensor rank's weight that are tokens, the first ones; the rest is padding. May be 0."""
        return min(max(self.vocab - self.tp_group.rank() * len(self.weight), 0), len(self.weight))

    @property
    def slots(self) -> int:
        """Token slots of this context rank, slack included; the same in every step."""
        return len(self.hidden) * self.tp_group.size()

    def states(self) -> Tensor:
        """[T_r, hidden]: the hidden states of all of this context rank's tokens, gathered over the tensor ranks.

        Their gradient is summed over the tensor ranks, as that of parts of the vocabulary has to be.
        """
        whole = self.hidden
        if self.tp_group.size() > 1:
            whole = gather_from_sequence_parallel_region(whole, tensor_parallel_output_grad=True, group=self.tp_group)
        return whole[: len(self.mask), 0]

    def logits(self) -> Tensor:
        """[slots, 1, vocab / tensor], made when asked for; the first T_r rows are tokens, what is behind them is slack.

        Those of the vocabulary's padding are NEVER, a constant: softmax gives them 0, and nothing has a gradient by them.
        """
        return _WithoutPadding.apply(self.project(self.hidden), self.held)

    def logits_for_softmax(self) -> Tensor:
        """`logits` for a loss that reads them through their softmax alone, whose gradient is zero where that is: no copy in its backward pass."""
        logits = self.project(self.hidden)
        logits.detach()[..., self.held :] = NEVER
        return logits


class _WithoutPadding(torch.autograd.Function):
    """Logits [..., vocab / tensor], of which those from `held` on are NEVER; in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, held: int) -> Tensor:
        ctx.held = held
        ctx.mark_dirty(logits)
        logits[..., held:] = NEVER
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.held < gradient.shape[-1]:
            gradient = gradient.clone()
            gradient[..., ctx.held :] = 0
        return gradient, None


class FinalLoss(Protocol):
    """A loss: sums over those of the rank's tokens that count, by the names that they are reported under; at least LOSS.

    What is differentiated is the total of all. The engine divides it by the number of tokens that count in the whole step, over all ranks.
    Tensor ranks give the same sums; context ranks and data replicas those of their own tokens.
    """

    def __call__(self, output: Output) -> Mapping[str, Tensor]: ...


def final_loss(settings: Config) -> FinalLoss:
    """The loss that `train.loss` names, made with the configuration: one of the table, or the user's own.

    Raises:
        FilesError: the user's own cannot be made, or is nothing that can be called.
    """
    name = settings.train.loss
    make = imported(LOSSES[name].source if name in LOSSES else name)
    fix = "it is called with the configuration, and what that gives with each Output"
    try:
        made: FinalLoss = make(settings)
    except Exception as error:  # the user's own code
        raise _refusal(f"{name}(settings) raised {type(error).__name__}: {error}", fix) from error
    if not callable(made):
        raise _refusal(f"{name}(settings) gives {made!r:.60}, which cannot be called", fix)
    return made


def require_parts(losses: Any, name: str, known: Collection[str]) -> Mapping[str, Tensor]:
    """What the final loss `name` gave for a micro-batch: sums of one number each, by names among `known`, LOSS among them.

    Raises:
        FilesError: it gave something else.
    """
    fix = f"it has to give sums over the rank's tokens by these names: {', '.join(known)}; the first always"
    if not isinstance(losses, Mapping):
        raise _refusal(f"{name} gave {type(losses).__name__}, and no mapping", fix)
    if LOSS not in losses or not {*losses} <= {*known}:
        raise _refusal(f"{name} gave {', '.join(map(repr, losses)) or 'nothing'}", fix)
    for part, value in losses.items():
        if not (isinstance(value, Tensor) and value.numel() == 1):
            kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise _refusal(f"{name} gave {part} as {kind}, and no tensor of one number", fix)
    return losses


def _refusal(problem: str, fix: str) -> FilesError:
    return FilesError([Mistake("train.loss", problem, fix)])


class CrossEntropy:
    """Cross-entropy of the next token, and z-loss."""

    def __init__(self, settings: Config) -> None:
        self.z_loss = settings.train.z_loss

    def __call__(self, output: Output) -> dict[str, Tensor]:
        logits = output.logits_for_softmax()
        # Slack is cut off, not multiplied by zero: whatever its slots hold cannot reach the loss.
        slack = len(logits) - len(output.targets)
        targets = torch.nn.functional.pad(output.targets, (0, slack))
        held = token_losses(logits, targets[:, None], self.z_loss, output.tp_group)[:, : len(output.mask)]
        entropy, z_loss = (held * output.mask).sum(1)
        return {LOSS: entropy, Z_LOSS: z_loss}


def token_losses(logits: Tensor, targets: Tensor, z_loss: float, tp_group: Any) -> Tensor:
    """Cross-entropy and z-loss of every slot.

    Args:
        logits: [slots, 1, vocab / tensor], this rank's shard of the vocabulary; may be overwritten.
        targets: int64 [slots, 1], ids of the whole vocabulary.
        z_loss: weight of log(Z)^2 (PaLM: Chowdhery et al., 2022); 0 skips its cost.
        tp_group: the tensor group.

    Returns:
        fp32 [2, slots]: nats per token, and z_loss * log(Z)^2. Unmasked: slack slots hold numbers without meaning.
    """
    if not z_loss:
        entropy = vocab_parallel_cross_entropy(logits, targets)[:, 0]
        return torch.stack((entropy, torch.zeros_like(entropy)))
    target_logit = _target_logits(logits, targets, tp_group)  # first: Megatron's cross-entropy overwrites fp32 logits
    entropy = vocab_parallel_cross_entropy(logits, targets)[:, 0]
    log_z = entropy + target_logit  # entropy = log Z - logit of the target
    return torch.stack((entropy, z_loss * log_z.square()))


def _target_logits(logits: Tensor, targets: Tensor, tp_group: Any) -> Tensor:
    """[slots, 1, vocab / tensor], [slots, 1] -> fp32 [slots]: the target's logit, wherever its shard is."""
    width = logits.shape[-1]
    local = targets[:, 0] - tp_group.rank() * width
    here = (local >= 0) & (local < width)
    rows = torch.arange(len(local), device=local.device) * width
    # index_select and not gather: its adjoint needs the index alone, so the logits may be overwritten afterwards.
    picked = logits.view(-1).index_select(0, rows + local.clamp(0, width - 1)).float()
    return reduce_from_tensor_model_parallel_region(picked * here, group=tp_group)
