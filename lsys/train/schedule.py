"""Megatron's schedules of the learning rate, but for the warm-up, whose first step Megatron takes with a rate of 0."""

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


class Schedule(OptimizerParamScheduler):
    """The rate of step n, from 1, is peak n / warm-up up to the peak at n = warm-up; the decay begins with the step after that, at the peak.

    Megatron's is peak (n - 1) / warm-up; decay and constant rates are the same. `num_steps`, which checkpoints hold, is the steps done.
    """

    def get_lr(self, param_group: dict) -> float:
        """The rate of the next step."""
        if self.num_steps < self.lr_warmup_steps:
            peak: Any = param_group.get("max_lr", self.max_lr)
            return float(peak) * (self.num_steps + 1) / self.lr_warmup_steps
        rate: float = super().get_lr(param_group)
        return rate
