"""What a run tells of itself: the console line, TensorBoard, and its record. Only rank 0 writes."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial

import torch
from rich.console import Console

from lsys.config import Config
from lsys.config.reports import LOSS, Metric, declared
from lsys.data.corpus import Corpus
from lsys.observe.efficiency import Efficiency, History, hardware_name
from lsys.observe.meter import Interval, memory
from lsys.observe.optional import Attempts
from lsys.observe.tensorboard import VALIDATION, Board, address
from lsys.observe.texts import corpora_table, rank_grid, versions_table
from lsys.observe.waterfall import Waterfall
from lsys.parallel.mesh import Mesh

RECORD = "scaling.json"  # in the run's folder
# What may fail, and no harm done, with the key that switches it off.
OPENING, CURVES = "opening TensorBoard's files (metrics.tensorboard)", "writing to TensorBoard (metrics.tensorboard)"
PICTURE, RANKS, WRITING = (
    "drawing the waterfall",
    "drawing the ranks' times",
    f"writing {RECORD} (a later metrics.baseline)",
)

UNSHOWN = "reports in TensorBoard, which could not be opened then"
PAUSE = 1.0  # s between the last two attempts to write


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
        self.attempt = Attempts(self.say)
        self.unshown = 0  # reports without curves
        self.board: Board | None = None
        self._opening = partial(self._open, mesh, nodes, first_step, text, corpora)
        self._open_board()

    def _open_board(self) -> None:
        if self.active and self.settings.metrics.tensorboard and self.board is None:
            self.attempt(OPENING, self._opening)

    def _open(
        self, mesh: Mesh, nodes: Sequence[int], first_step: int, text: str, corpora: Sequence[tuple[Corpus, float]]
    ) -> None:
        texts = {
            "config": f"```yaml\n{text}```",
            "ranks": rank_grid(mesh, nodes),
            "versions": versions_table(self.device),
            "corpora": corpora_table(corpora),
        }
        self.board = Board(self.settings, ranks=self.ranks, nodes=nodes, first_step=first_step, texts=texts)
        self.attempt(CURVES, self.board.flush)
        self.say(f"curves: tensorboard --logdir {self.settings.train.folder}, then {address()}")

    def say(self, message: str) -> None:
        """Print a line. One that a full disk does not take comes with a later one; where the reader has ended, none does."""
        try:
            self.console.print(message, markup=False)
        except OSError:
            pass
        except SystemExit:  # rich would end the process with its reader
            with contextlib.suppress(OSError):
                print("lsys: nothing reads the console any more; training goes on", file=sys.stderr, flush=True)

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
        self._curves(step, values, waterfall)
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

    def _curves(self, step: int, values: Mapping[str, float], waterfall: Waterfall | None = None) -> None:
        """Points and pictures of the steps up to `step`, and to the disk with what waits."""
        self._open_board()
        if self.board:
            self.attempt(CURVES, self._show, self.board, step, values, waterfall)
        elif self.active and self.settings.metrics.tensorboard:
            self.unshown += 1

    def _show(self, board: Board, step: int, values: Mapping[str, float], waterfall: Waterfall | None) -> None:
        board.scalars(step, values)
        if waterfall:
            board.waterfall(step, waterfall)
            self.attempt(RANKS, board.draw_ranks)
            self.attempt(PICTURE, board.draw)
        board.flush()

    @staticmethod
    def _numbers(metric: Metric, values: Mapping[str, float]) -> str:
        return " ".join(f"{values[tag]:.4g}" for tag in metric.tags if tag in values) or "-"

    def validation(
        self, step: int, loss: float, entropy: float | None, values: Mapping[str, float] | None = None
    ) -> None:
        """Held-out loss, beside the corpus's bigram entropy where that is known; and what else was reported, as `validation/NAME`."""
        if self.active:
            others = {f"validation/{tag}": value for tag, value in (values or {}).items() if tag != LOSS}
            self._curves(step, {VALIDATION: loss, **others})
        beside = f" (bigram entropy of the corpus: {entropy:.4f})" if entropy is not None else ""
        self.say(f"step {step} | validation loss {loss:.4f} nats per token{beside}")

    def close(self) -> None:
        """End the curves, write what the run achieved, for later runs to compare themselves with, and say what could not be written."""
        if not self.active:
            return
        if self.board:
            self.attempt(RANKS, self.board.draw_ranks, True)
            self.attempt(PICTURE, self.board.draw, True)
        writes = {WRITING: self._record, **({CURVES: self.board.flush} if self.board else {})}
        if not all([self.attempt(what, call, again=f"in {PAUSE:g} s") for what, call in writes.items()]):
            time.sleep(PAUSE)
            for what in writes.keys() & self.attempt.failing:
                self.attempt(what, writes[what])
        missing = [self.attempt.summary(), self.board.lost if self.board else ""]
        missing += [f"{self.unshown} {UNSHOWN}"] if self.unshown else []
        if any(missing):
            self.say(f"warning: could not be written: {'; '.join(filter(None, missing))}")

    def _record(self) -> None:
        record = self.history.record(self.settings, self.ranks, hardware_name(self.device))
        if record:
            record.save(self.settings.train.folder / RECORD)


def _shown(values: Mapping[str, float], tag: str, form: str) -> str:
    """The number, or a dash where the step has none."""
    return format(values[tag], form) if tag in values else "-"
