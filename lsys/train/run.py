"""One run, from a configuration to its last checkpoint."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from lsys.checkpoint import choice
from lsys.checkpoint.starts import FOLDER
from lsys.config import Config
from lsys.config.load import dump
from lsys.config.rules import check_files, require
from lsys.config.schema import ADAMW
from lsys.config.user_code import is_path
from lsys.observe.efficiency import Efficiency, open_baseline
from lsys.observe.optional import say
from lsys.observe.run_dir import require_own_folder
from lsys.parallel.mesh import Mesh
from lsys.runtime.environment import launch_from_environment, require_launcher
from lsys.runtime.groups import Groups, process_groups
from lsys.runtime.lock import FolderLock
from lsys.train import position
from lsys.train.corpora import open_corpora
from lsys.train.errors import step_named
from lsys.train.folders import require_folders
from lsys.train.stopped import clear

if TYPE_CHECKING:  # at run time this would import torch before what can be refused is refused
    from lsys.data.corpus import Corpus
    from lsys.train.observers import Observers, StepDone
    from lsys.train.protocol import TrainingEngine


def main(settings: Config) -> int:
    """Train as configured; the exit code."""
    from lsys.train.finished import finished_step
    from lsys.train.signals import heed_until

    launch = launch_from_environment()
    if (done := finished_step(settings, launch)) is not None:
        if launch.rank == 0:
            say(nothing_to_do(done, settings.train.steps))
        return 0
    with open_run(settings) as run:
        heed_until(lambda: run.is_done)
        run.train()
    return 0


def nothing_to_do(done: int, steps: int) -> str:
    return f"nothing to do: train.steps is {steps} and the checkpoint has done {done}; raise train.steps to go on"


@contextlib.contextmanager
def open_run(settings: Config) -> "Iterator[Run]":
    """The run of this launch and its process groups. All that can be refused is refused before one of them starts."""
    require_launcher()
    launch = launch_from_environment()
    require(settings, launch.world_size)
    check_files(settings, *choice.mistakes(settings))
    efficiency = open_baseline(settings, launch)
    if settings.model.mixers.paths or settings.optimizer.kind != ADAMW or is_path(settings.train.loss):
        _require_own(settings)
    # The first rank holds the folder for all, and looks at it alone.
    lock = _lock(settings) if launch.rank == 0 else None
    if lock:
        lock.look()
        require_own_folder(settings, choice.keeps_folder(settings))
    corpora = open_corpora(settings, is_first=launch.rank == 0)
    if launch.rank == 0:
        position.refuse_other_data(settings, corpora)
    require_folders(settings, launch)  # last, as it makes them
    with lock or contextlib.nullcontext():
        if lock and (said := clear(settings.train.folder)):
            say(said)
        with process_groups(settings.parallel, launch, timeout_minutes=settings.train.timeout_minutes) as groups:
            yield Run(settings, groups, efficiency, lock=lock, corpora=corpora)


def _lock(settings: Config) -> FolderLock:
    return FolderLock(settings.train.folder, lambda text: print(f"lsys: {text}", file=sys.stderr, flush=True))


def _require_own(settings: Config) -> None:
    """Refuse code of the user's own that cannot be what it is for, before a process group starts."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.model.loss import final_loss
    from lsys.model.own import require_modules
    from lsys.train.own_trial import require_optimizer

    require_modules(settings)
    require_optimizer(settings.optimizer)
    final_loss(settings)


class Run:
    """The loop and what it needs: data, engine, checkpoints, reports.

    Args:
        make_engine: makes the engine of this rank; Megatron's if None.
        lock: by which the first rank holds the folder; None on the others, and where nobody else can be there.
        corpora: that are read, open and checked.
    """

    def __init__(
        self,
        settings: Config,
        groups: Groups,
        efficiency: Efficiency | None = None,
        make_engine: "Callable[[Config, Groups], TrainingEngine] | None" = None,
        lock: FolderLock | None = None,
        corpora: "Sequence[Corpus]" = (),
    ) -> None:
        from lsys.checkpoint import Checkpoints
        from lsys.observe.hardware import peak_of_ranks
        from lsys.observe.meter import Meter
        from lsys.observe.profiler import Profiler
        from lsys.observe.reporter import Reporter
        from lsys.observe.waterfall_recorder import Recorder
        from lsys.train.data import open_data
        from lsys.train.engine import Engine
        from lsys.train.skips import Updates
        from lsys.train.start import begin

        self.settings, self.groups = settings, groups
        self.data = open_data(settings, groups, corpora)
        self.engine: TrainingEngine = (make_engine or Engine)(settings, groups)
        self.lock = lock
        folder, guard = settings.train.folder / FOLDER, lock.require if lock else None
        self.checkpoints = Checkpoints(folder, settings.checkpoint.keep, guard)
        self.updates = Updates(lambda text: self.reporter.say(text))
        self.begun = begin(settings, self.engine, self.checkpoints.guard)
        self.step = self.begun.step
        self.updates.skipped = int(self.begun.kept.get("skipped_steps", 0))
        self.data, lines = position.resumed(self.data, self.begun)
        self.lines = (*self.begun.lines, *lines)
        self.saved_step = self.step
        self.is_stopping = False
        self.observers: Observers
        self.meter, self.waterfall = Meter(), Recorder(groups, settings.metrics.waterfall_every)
        self.profiler = Profiler(
            settings.train.profile,
            rank=groups.launch.rank,
            folder=settings.train.folder / "profile",
            device=groups.device,
            models=self.engine.chunks,
        )
        active = groups.launch.rank == 0
        self.reporter = Reporter(
            settings,
            active=active,
            mesh=Mesh.of(settings.parallel, groups.launch.world_size),
            nodes=groups.nodes,
            device=groups.device,
            peak=peak_of_ranks(groups.device, settings.train.precision),
            efficiency=efficiency,
            first_step=self.step + 1,
            text=dump(settings),
            corpora=self.data.corpora,
        )

    def train(self) -> None:
        """Steps until `train.steps` or SIGTERM; the observers do all else."""
        steps, failed = self.settings.train.steps, True
        for line in self.lines:
            self.reporter.say(line)
        if self.step >= steps:
            self.reporter.say(nothing_to_do(self.step, steps))
            self.reporter.close()
            return
        self.observers = self._observers()
        try:
            with ThreadPoolExecutor(1) as ahead:
                plan = ahead.submit(self.data.training, self.step)
                while not self.is_ending:
                    with self.observers.paused("data"):
                        batches, flops = plan.result()
                    if self.step + 1 < steps:
                        plan = ahead.submit(self.data.training, self.step + 1)
                    self.observers.end_step(self._train_step(batches, flops))
            failed = False
        finally:
            self.observers.close(failed)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step; another one may be asked for by SIGTERM."""
        from lsys.train.observers import is_due

        options, is_last = self.settings.checkpoint, step >= self.settings.train.steps
        return options.save and (is_due(step, options.every) or is_last or self.updates.save_is_due)

    @property
    def is_ending(self) -> bool:
        """Whether no other step follows."""
        return self.is_stopping or self.step >= self.settings.train.steps

    @property
    def is_done(self) -> bool:
        """Whether no other step follows, and what was done is saved."""
        return self.is_ending and (self.step == self.saved_step or not self.settings.checkpoint.save)

    def _observers(self) -> "Observers":
        from lsys.train import observers as known
        from lsys.train.skips import Limit

        meter, rank = self.meter, self.groups.launch.rank

        def tell(text: str) -> None:
            say(f"rank {rank}: {text}")

        stopping, saving = known.Stopping(self), known.Saving(self)
        return known.Observers(
            [
                known.Validation(self, stopping, saving),
                saving,
                stopping,
                Limit(self),
                *known.own_observers(self, tell),
                known.Tracing(self, self.profiler),
                known.Reporting(self, self.reporter, meter, self.waterfall),
                known.Metering(meter, self.settings.train.batch_tokens),
                known.Splitting(self.waterfall, self.step + 1),
            ],
            tell,
        )

    def _train_step(self, batches: list, flops: float) -> "StepDone":
        from lsys.train.observers import StepDone

        self.observers.begin_step(self.step + 1)
        with step_named(f"step {self.step + 1}", self.groups.launch.rank):
            losses = self.engine.forward_backward(batches)
        if self.settings.optimizer.distributed and self.saves_after(self.step + 1):
            self._compare_replicas()  # the update makes all alike again
        lr = self.engine.learning_rate
        update = self.engine.step()
        self.step += 1
        origin = "" if update.applied else self.engine.find_not_finite(batches)
        self.updates.note(self.step, losses, update, origin)
        return StepDone(self.step, losses, update.norm, lr, flops, update.applied)

    def _compare_replicas(self) -> None:
        from lsys.checkpoint.agreement import RankFailure
        from lsys.checkpoint.state import require_equal_models

        try:
            require_equal_models(self.engine)
        except RankFailure as failure:  # such as no memory for it
            self.reporter.say(f"warning: replicas were not compared before the save of step {self.step + 1}: {failure}")

    def save(self) -> None:
        """Write a checkpoint of the steps done, unless there is one (collective)."""
        from lsys.train.skips import save_left_out

        if not self.settings.checkpoint.save or self.step == self.saved_step:
            return
        with self.observers.paused("checkpoint"), self.engine.settled_parameters():
            if refusal := self.updates.refusal(self.engine.numbers()):
                save_left_out(self, refusal)
                return
            extra = {"skipped_steps": self.updates.skipped} | self.begun.extra(self.engine)
            cursor = position.saved(self.data, self.step, dump(self.settings), extra)
            path = self.checkpoints.save(self.engine, cursor)
        self.saved_step, self.updates.save_is_due = self.step, False
        self.reporter.say(f"saved {path}")
