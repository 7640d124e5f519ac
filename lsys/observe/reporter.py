"""The console line and the TensorBoard curves of a run. Only rank 0 writes."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lsys.config import Config
from lsys.observe.meter import Interval, memory


class Reporter:
    """Writes metrics of rank 0; on other ranks it does nothing.

    Tags are torchtitan's where it has them: `loss_metrics/global_avg_loss`, `grad_norm`, `lr`, `n_tokens_seen`, `throughput(tps)` and `tflops`
    (both per rank), `mfu(%)`, `time_metrics/end_to_end(s)` (per step), `time_metrics/data_loading(%)`, `memory/max_reserved(GiB)`.

    Args:
        active: whether this process reports.
        ranks: number of ranks.
        peak: peak FLOP/s of all ranks together, or None where it is unknown: then MFU is left out.
        first_step: points of an earlier part of the run from this step on are dropped, so the curve of a resumed run is one.
    """

    def __init__(
        self,
        settings: Config,
        *,
        active: bool,
        ranks: int,
        device: torch.device,
        peak: float | None,
        first_step: int,
        text: str,
    ) -> None:
        self.settings, self.ranks, self.device, self.peak = settings, ranks, device, peak
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self.writer: Any = None
        if active and settings.metrics.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard_folder(settings)), purge_step=first_step)
            self.writer.add_text("config", f"```yaml\n{text}```", first_step)

    def say(self, message: str) -> None:
        self.console.print(message)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def training(
        self, step: int, interval: Interval, *, loss: float, z_loss: float, grad_norm: float, lr: float, seen: int
    ) -> None:
        """One console line and one point per curve, for the steps up to `step`."""
        name, gib = memory(self.device)
        flops = interval.flops / interval.seconds  # of all ranks
        values = {
            "loss_metrics/global_avg_loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "n_tokens_seen": seen,
            "throughput(tps)": interval.tokens_per_second / self.ranks,
            "tflops": flops / self.ranks / 1e12,
            "time_metrics/end_to_end(s)": interval.step_seconds,
            "time_metrics/data_loading(%)": interval.data_percent,
            f"memory/{name}(GiB)": gib,
        }
        if self.settings.train.z_loss:
            values["loss_metrics/z_loss"] = z_loss
        if self.peak:
            values["mfu(%)"] = 100 * flops / self.peak
        self.scalars(step, values)
        mfu = f" | mfu {values['mfu(%)']:.1f}%" if self.peak else ""
        total = self.settings.train.steps
        left = timedelta(seconds=round((total - step) * interval.step_seconds))
        self.say(
            f"step {step:>{len(str(total))}}/{total} | loss {loss:.4f} | {interval.tokens_per_second:,.0f} tokens/s{mfu} | "
            f"memory {gib:.2f} GiB | grad norm {grad_norm:.2f} | lr {lr:.2e} | ETA {left}"
        )

    def validation(self, step: int, loss: float, entropy: float | None) -> None:
        """Held-out loss, beside the corpus's bigram entropy where that is known."""
        self.scalars(step, {"loss_metrics/validation_loss": loss})
        beside = f" (bigram entropy of the corpus: {entropy:.4f})" if entropy is not None else ""
        self.say(f"step {step} | validation loss {loss:.4f} nats per token{beside}")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def tensorboard_folder(settings: Config) -> Path:
    return settings.train.folder / "tensorboard"
