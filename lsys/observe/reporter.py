"""What a run tells of itself: the console line, TensorBoard, and its record. Only rank 0 writes."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console

from lsys.config import Config
from lsys.config.reports import LOSS, Metric, declared
from lsys.data.corpus import Corpus
from lsys.observe.efficiency import Efficiency, History, hardware_name
from lsys.observe.meter import Interval, memory
from lsys.observe.tensorboard import VALIDATION, Board, address
from lsys.observe.texts import corpora_table, rank_grid, versions_table
from lsys.observe.waterfall import Waterfall
from lsys.parallel.mesh import Mesh

RECORD = "scaling.json"  # in the run's folder
OPENING, CURVES, CLOSING = "opening TensorBoard's files", "writing to TensorBoard", "closing TensorBoard's files"
PICTURE, RANKS, WRITING = "drawing the waterfall", "drawing the ranks' times", f"writing {RECORD}"


class Reporter:
    """Writes metrics of rank 0; on other ranks it does nothing.

    Tags are torchtitan's where it has them: `loss_metrics/global_avg_loss`, `grad_norm`, `lr`, `n_tokens_seen`, `throughput(tps)` and `tflops`
    (both per rank), `mfu(%)`, `time_metrics/end_to_end(s)` (per step), `time_metrics/data_loading(%)`, `memory/max_reserved(GiB)`. Beside them
    `waterfall/<part>(%)`, which sum to 100, `comm/<axis>/bytes`, `total(ms)` and `exposed(ms)` of a step, means of the ranks, and
    `scaling/efficiency(%)` against the baseline.

    Args:
        active: whether this process reports.
        nodes: of each rank.
        peak: peak FLOP/s of all ranks together, or None where it is unknown: then MFU is left out.
        efficiency: against a baseline, if there is one.
        first_step: points of an earlier part of the run from this step on are dropped, so the curve of a resumed run is one.
        text: the resolved configuration.
        corpora: that the run reads, with their weights.
    """

    def __init__(
        self,
        settings: Config,
        *,
        active: bool,
        mesh: Mesh,
        nodes: Sequence[int],
        device: torch.device,
        peak: float | None,
        efficiency: Efficiency | None,
        first_step: int,
        text: str,
        corpora: Sequence[tuple[Corpus, float]],
    ) -> None:
        self.settings, self.ranks, self.device = settings, mesh.world_size, device
        self.peak, self.efficiency = peak, efficiency
        self.active, self.history = active, History()
        self.metrics = [metric for metric in declared(settings) if metric.shown]
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self.failed: set[str] = set()
        self.board: Board | None = None
        if active and settings.metrics.tensorboard:
            texts = {
                "config": f"```yaml\n{text}```",
                "ranks": rank_grid(mesh, nodes),
                "versions": versions_table(device),
                "corpora": corpora_table(corpora),
            }
            self._show(OPENING, self._open, nodes, first_step, texts)

    def _open(self, nodes: Sequence[int], first_step: int, texts: Mapping[str, str]) -> None:
        self.board = Board(self.settings, ranks=self.ranks, nodes=nodes, first_step=first_step, texts=texts)
        self.say(f"curves: tensorboard --logdir {self.settings.train.folder}, then {address()}")

    def say(self, message: str) -> None:
        self.console.print(message)

    def _show(self, what: str, call: Callable[..., None], *args: Any) -> None:
        """Do what is optional: its failure is told once, and it is left out from then on."""
        if what in self.failed:
            return
        try:
            call(*args)
        except Exception as error:  # a full disk, no fonts
            self.failed.add(what)
            self.say(f"{what} failed and is left out from now on: {type(error).__name__}: {error}")

    def training(
        self, step: int, interval: Interval, values: Mapping[str, float], waterfall: Waterfall | None = None
    ) -> None:
        """One console line and one point per curve, for the steps up to `step`.

        Args:
            values: by tag, what the steps themselves gave; the loss, the norm of the gradients and the learning rate are among them.
        """
        name, gib = memory(self.device)
        flops = interval.flops / interval.seconds  # of all ranks
        values = {
            **values,
            "throughput(tps)": interval.tokens_per_second / self.ranks,
            "tflops": flops / self.ranks / 1e12,
            "time_metrics/end_to_end(s)": interval.step_seconds,
            "time_metrics/data_loading(%)": interval.data_percent,
            f"memory/{name}(GiB)": gib,
        }
        if self.peak:
            values["mfu(%)"] = 100 * flops / self.peak
        if self.efficiency:
            values["scaling/efficiency(%)"] = self.efficiency.percent(flops / self.ranks)
        if self.active:
            self.history.add(interval.step_seconds, flops / self.ranks, waterfall.parts if waterfall else None)
        for note in waterfall.notes if waterfall else ():
            self.say(f"waterfall: {note}")
        if self.board:
            self._show(CURVES, self.board.scalars, step, values)
            if waterfall:
                self._show(CURVES, self.board.waterfall, step, waterfall)
                self._show(RANKS, self.board.draw_ranks)
                self._show(PICTURE, self.board.draw)
        mfu = f" | mfu {values['mfu(%)']:.1f}%" if self.peak else ""
        total = self.settings.train.steps
        left = timedelta(seconds=round((total - step) * interval.step_seconds))
        self.say(
            f"step {step:>{len(str(total))}}/{total} | loss {_shown(values, LOSS, '.4f')} | {interval.tokens_per_second:,.0f} tokens/s{mfu} | "
            f"memory {gib:.2f} GiB | grad norm {_shown(values, 'grad_norm', '.2f')} | lr {values['lr']:.2e} | ETA {left}"
            + (f" | efficiency {values['scaling/efficiency(%)']:.1f}%" if self.efficiency else "")
            + "".join(
                f" | {metric.console} {self._numbers(metric, values)}" for metric in self.metrics if metric.console
            )
            + (f" | {waterfall.line}" if waterfall else "")
        )

    @staticmethod
    def _numbers(metric: Metric, values: Mapping[str, float]) -> str:
        return " ".join(f"{values[tag]:.4g}" for tag in metric.tags if tag in values) or "-"

    def validation(
        self, step: int, loss: float, entropy: float | None, values: Mapping[str, float] | None = None
    ) -> None:
        """Held-out loss, beside the corpus's bigram entropy where that is known; and what else was reported, as `validation/NAME`."""
        if self.board:
            others = {f"validation/{tag}": value for tag, value in (values or {}).items() if tag != LOSS}
            self._show(CURVES, self.board.scalars, step, {VALIDATION: loss, **others})
        beside = f" (bigram entropy of the corpus: {entropy:.4f})" if entropy is not None else ""
        self.say(f"step {step} | validation loss {loss:.4f} nats per token{beside}")

    def close(self) -> None:
        """End the curves, and write what the run achieved, for later runs to compare themselves with."""
        if self.board:
            self._show(RANKS, self.board.draw_ranks, True)
            self._show(PICTURE, self.board.draw, True)
            self._show(CLOSING, self.board.close)
        record = self.history.record(self.settings, self.ranks, hardware_name(self.device)) if self.active else None
        if record:
            self._show(WRITING, record.save, self.settings.train.folder / RECORD)


def _shown(values: Mapping[str, float], tag: str, form: str) -> str:
    """The number, or a dash where the step has none."""
    return format(values[tag], form) if tag in values else "-"
