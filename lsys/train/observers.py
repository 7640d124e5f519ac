"""What watches the loop: a small protocol, and its members. The loop goes over them, and knows none by name.

A step's order: `paused("data")` around the wait for its batches; `begin_step` from the first observer to the last; the step;
`end_step` from the last to the first, so that they lie in each other like contexts. `close` comes last, once, whatever happened.

An observer is required or optional. What a required one raises ends the run, and it may communicate: all ranks call it alike. An optional
one makes no collective, so one rank's can fail on its own: it is told once, closed, and left out from then on; the run goes on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lsys.config.reports import LOSS, SKIPPED, TOKENS
from lsys.config.user_code import imported
from lsys.observe.meter import Meter
from lsys.observe.optional import Attempts, say
from lsys.observe.profiler import Profiler
from lsys.observe.reporter import Reporter
from lsys.observe.waterfall_recorder import Recorder
from lsys.train.errors import RunError, step_named
from lsys.train.saving import Saves
from lsys.train.signals import StopRequest

if TYPE_CHECKING:
    from lsys.observe.values import Values
    from lsys.train.protocol import Losses
    from lsys.train.run import Run

TRACE = "writing a trace (train.profile)"
PAUSES = ("data", "report", "validation", "checkpoint")


@dataclass(frozen=True)
class StepDone:
    """A step that has been taken.

    Attributes:
        step: its number, from 1. losses: what it reported. grad_norm: before clipping. lr: that it was taken with.
        flops: model FLOPs of this rank's data replica. applied: whether the update was made; not, if it was not finite.
    """

    step: int
    losses: Losses
    grad_norm: float
    lr: float
    flops: float
    applied: bool = True


class StepObserver:
    """An observer that does nothing. Subclasses override what they need.

    Attributes:
        required: whether its failure ends the run; see above.
    """

    required = False

    def begin_step(self, step: int) -> None:
        """Step `step`, from 1, begins; its batches are there."""

    def end_step(self, done: StepDone) -> None:
        """The parameters have been updated, unless `done.applied` says otherwise."""

    def paused(self, what: str) -> AbstractContextManager[Any]:
        """Around what is no part of a step's own work: one of PAUSES. No pause is in another one."""
        return contextlib.nullcontext()

    def close(self, failed: bool) -> None:
        """The run ends, or an optional observer is left out; `failed`: by an error. Called once."""


class Observers:
    """The observers of a run, called as one.

    Args:
        tell: how an optional one's failure is told.
    """

    def __init__(self, observers: Sequence[StepObserver], tell: Callable[[str], None]) -> None:
        self.observers, self.tell = list(observers), tell
        self._pause = ""  # that goes on

    def begin_step(self, step: int) -> None:
        for each in tuple(self.observers):
            self._call(each, each.begin_step, step)

    def end_step(self, done: StepDone) -> None:
        for each in reversed(tuple(self.observers)):
            self._call(each, each.end_step, done)

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """One of PAUSES around what happens inside.

        Raises:
            RunError: it is in another one.
        """
        if self._pause:
            raise RunError(
                f'paused("{what}") inside paused("{self._pause}"): the time of one pause counts as one thing; end the outer one first'
            )
        self._pause = what
        with ExitStack() as stack:
            stack.callback(setattr, self, "_pause", "")
            for each in tuple(self.observers):
                context = self._call(each, each.paused, what)
                if context is not None:
                    self._call(each, context.__enter__)
                    stack.callback(self._call, each, context.__exit__, None, None, None)
            yield

    def close(self, failed: bool) -> None:
        """Close all, the last first; each, even if another one fails."""
        with ExitStack() as stack:
            for each in tuple(self.observers):
                stack.callback(self._call, each, each.close, failed)

    def _call(self, observer: StepObserver, method: Callable[..., Any], *args: Any) -> Any:
        if observer.required:
            return method(*args)
        if all(each is not observer for each in self.observers):
            return None
        try:
            return method(*args)
        except Exception as error:
            self.observers = [each for each in self.observers if each is not observer]
            name = f"{type(observer).__module__}:{type(observer).__qualname__}"
            self.tell(f"{name} failed and is left out from now on: {type(error).__name__}: {error}")
            if method != observer.close:
                try:
                    observer.close(True)
                except Exception as also:
                    self.tell(f"{name} could not be closed either: {type(also).__name__}: {also}")
            return None


def own_observers(run: Run, tell: Callable[[str], None]) -> list[StepObserver]:
    """The observers of `train.observers`, each made with the run. An optional one that cannot be made is told, and left out."""
    found: list[StepObserver] = []
    for path in run.settings.train.observers:
        kind = imported(path)
        try:
            found.append(kind(run))
        except Exception as error:
            if kind.required:
                raise
            tell(f"{path} could not be made and is left out: {type(error).__name__}: {error}")
    return found


# ---- those of every run, in their order


class Saving(StepObserver):
    """Checkpoints at their interval, at the end and on SIGTERM."""

    required = True

    def __init__(self, run: Run) -> None:
        self.run, self.saves = run, Saves(run)

    def end_step(self, done: StepDone) -> None:
        if self.run.is_ending:
            self.saves.at_end()
        elif self.run.saves_after(done.step):
            self.saves.at_interval()


class Stopping(StepObserver):
    """Ends the run after a step in which any rank got SIGTERM, but not behind an update that was left out: the next step that is made, or the limit
    of those left out, is near, and nothing could be saved now."""

    required = True

    def __init__(self, run: Run) -> None:
        self.run, self._stack, self.is_heard = run, ExitStack(), False
        self.request = self._stack.enter_context(
            StopRequest(run.groups.device, lambda: bool(run.lock and run.lock.is_lost))
        )

    def end_step(self, done: StepDone) -> None:
        self.hear(done.step)

    def hear(self, step: int) -> bool:
        """Whether any rank got SIGTERM (collective); then no step follows this one."""
        if not self.is_heard and self.request.agreed() and not self.run.updates.last:
            self.run.reporter.say(f"SIGTERM: saving after step {step} and stopping")
            self.is_heard = self.run.is_stopping = True
        return self.is_heard

    def close(self, failed: bool) -> None:
        self._stack.close()


class Validation(StepObserver):
    """Loss over the held-out documents, at its interval and at the end: after what is to be saved is saved. SIGTERM ends it."""

    required = True

    def __init__(self, run: Run, stopping: Stopping, saving: Saving) -> None:
        self.run, self.stopping, self.saving = run, stopping, saving

    def end_step(self, done: StepDone) -> None:
        train = self.run.settings.train
        if is_due(done.step, train.validate_every) or done.step == train.steps:
            self._validate(done.step)
            if self.run.is_stopping:
                self.saving.saves.at_end()

    def _validate(self, step: int) -> None:
        data, engine, values = self.run.data, self.run.engine, None
        if not data.validation_steps:
            return
        with self.run.observers.paused("validation"), engine.settled_parameters():
            for batches in data.validation():
                if self.stopping.hear(step):
                    self.run.reporter.say(f"the validation of step {step} is given up")
                    return
                with step_named(f"the validation after step {step}", self.run.groups.launch.rank):
                    found = engine.forward_backward(batches, forward_only=True).values
                values = values.followed_by(found) if values else found
        assert values is not None  # there are validation steps
        if not values.total(TOKENS):
            self.run.reporter.say(f"step {step} | no validation loss: no target of the held-out documents counts")
            return
        loss = values.total(LOSS) / values.total(TOKENS)
        if not math.isfinite(loss):
            self.run.reporter.say(f"step {step} | validation loss {loss}, which is no point of its curve")
            return
        self.run.reporter.validation(step, loss, data.bigram_entropy, values.curves)


class Tracing(StepObserver):
    """Traces of chosen steps. A disk that is full costs the trace, if it stays so to the end, not the run."""

    def __init__(self, run: Run, profiler: Profiler) -> None:
        self.run, self.profiler, self._step = run, profiler, ExitStack()
        self.attempt = Attempts(self._say)

    def _say(self, text: str) -> None:
        say(f"rank {self.run.groups.launch.rank}: {text}")

    def begin_step(self, step: int) -> None:
        self._step.enter_context(self.profiler.step(step))

    def end_step(self, done: StepDone) -> None:
        self._step.close()
        if self.profiler.is_complete(done.step):
            with self.run.observers.paused("report"):
                self.profiler.end()
                self._write()
        elif self.profiler.waiting and is_due(done.step, self.run.settings.metrics.every):
            with self.run.observers.paused("report"):
                self._write()

    def _write(self) -> None:
        def write() -> None:
            say(f"rank {self.run.groups.launch.rank} wrote {self.profiler.write()}")

        self.attempt(TRACE, write)

    def close(self, failed: bool) -> None:
        self._step.close()
        self.profiler.close()
        if self.profiler.waiting:
            self._write()
        if self.profiler.waiting:
            self._say(f"warning: could not be written: {self.attempt.summary()}")


class Reporting(StepObserver):
    """The console's line and TensorBoard's points, at their interval and at the end."""

    required = True

    def __init__(self, run: Run, reporter: Reporter, meter: Meter, recorder: Recorder) -> None:
        self.run, self.reporter, self.meter, self.recorder = run, reporter, meter, recorder
        self.values: Values | None = None  # that the steps since the last report gave

    def end_step(self, done: StepDone) -> None:
        settings, found = self.run.settings, done.losses.values
        if done.applied:
            self.values = self.values.followed_by(found) if self.values else found
        if not is_due(done.step, settings.metrics.every) and done.step != settings.train.steps:
            return
        own = self.meter.take()
        with self.run.observers.paused("report"):
            interval = replace(own, flops=self.run.data.flops_of_all(own.flops))
            values = {**(self.values or found).shown(found), "grad_norm": done.grad_norm, "lr": done.lr}
            values["n_tokens_seen"] = self.run.data.position.tokens_seen(done.step)
            values[SKIPPED] = self.run.updates.skipped
            values = {tag: value for tag, value in values.items() if math.isfinite(value)}
            self.reporter.training(done.step, interval, values, waterfall=self.recorder.take())
        self.values = None

    def close(self, failed: bool) -> None:
        if not failed:  # what it achieved is no record then
            self.reporter.close()


class Metering(StepObserver):
    """Seconds, tokens and FLOPs of the steps."""

    required = True

    def __init__(self, meter: Meter, tokens: int) -> None:
        self.meter, self.tokens = meter, tokens

    def end_step(self, done: StepDone) -> None:
        self.meter.add(self.tokens, done.flops)

    def paused(self, what: str) -> AbstractContextManager[Any]:
        if what == "report":  # a report costs the steps after it
            return contextlib.nullcontext()
        return self.meter.waiting_for_data() if what == "data" else self.meter.paused()


class Splitting(StepObserver):
    """The waterfall's parts: what is between the beginning and the end of a step is computed."""

    required = True
    REGIONS = {"data": "data", "report": "report", "validation": "paused", "checkpoint": "checkpoint"}

    def __init__(self, recorder: Recorder, first: int) -> None:
        self.recorder, self._run, self._step = recorder, ExitStack(), ExitStack()
        self._run.enter_context(recorder.recording(first))

    def begin_step(self, step: int) -> None:
        self._step.enter_context(self.recorder.region("compute"))

    def end_step(self, done: StepDone) -> None:
        self._step.close()
        self.recorder.end_step(done.step)

    def paused(self, what: str) -> AbstractContextManager[Any]:
        return self.recorder.region(self.REGIONS[what])

    def close(self, failed: bool) -> None:
        self._step.close()
        self._run.close()


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one; 0: never."""
    return every > 0 and step % every == 0
