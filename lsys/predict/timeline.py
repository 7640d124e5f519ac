"""The passes of all stages of a pipeline, in simulated time."""

from __future__ import annotations

from dataclasses import dataclass

from lsys.predict.deployment import Deployment
from lsys.predict.schedule import Pass, passes


@dataclass(frozen=True)
class Duration:
    """Seconds of one pass: the work of the rank that has most, the mean of ranks, and what is exposed of communication."""

    compute: float
    mean: float
    tensor: float
    context: float

    @property
    def exposed(self) -> float:
        return self.tensor + self.context


Durations = dict[tuple[bool, int], Duration]  # of a stage's passes by (is forward, chunk)


@dataclass
class Running:
    """The pass that a stage's ranks compute: s of work left, and when it began."""

    step: Pass
    left: float
    since: float


class Timeline:
    """A pass starts when its stage is free and what it needs has come from the stage before (or, backward, behind).

    Where ranks outnumber a node's cores, those that compute at the same time share them.

    Args:
        durations: by stage. border: s of a message between stages. cores: of a node; None: one for each rank.

    Attributes:
        slowed: s by stage that its ranks waited for a core. transferred: s of messages between stages.
    """

    def __init__(
        self, deployment: Deployment, durations: list[Durations], border: float, cores: int | None = None
    ) -> None:
        self.stages, self.chunks = deployment.mesh.pipeline, deployment.chunks
        self.durations, self.border = durations, border
        # Of each stage the passes to come, the next one last.
        self.order = [passes(self.stages, s, self.chunks, deployment.micro_batches)[::-1] for s in range(self.stages)]
        self.weight = min(deployment.world_size // self.stages, deployment.ranks_per_node)
        self.cores = cores or float("inf")
        self.slowed, self.transferred = [0.0] * self.stages, [0.0] * self.stages
        self.now, self.free = 0.0, [0.0] * self.stages
        self.running: dict[int, Running] = {}
        self.done: dict[tuple[int, Pass], float] = {}  # when what the next stage needs is there

    def run(self) -> float:
        """When the last pass ends."""
        while any(self.order) or self.running:
            speed = min(1.0, self.cores / max(1, len(self.running) * self.weight))
            ends = [(self.now + pass_.left / speed, stage) for stage, pass_ in self.running.items()]
            when, stage = min(self._starts() + ends)
            for pass_ in self.running.values():
                pass_.left -= (when - self.now) * speed
            self.now = max(self.now, when)
            if stage in self.running:
                self._end(stage, self.running.pop(stage))
            else:
                step = self.order[stage].pop()
                self.running[stage] = Running(step, self._duration(stage, step).compute, self.now)
        return max(self.done.values())

    def _starts(self) -> list[tuple[float, int]]:
        """When idle stages can begin their next pass, of those for which it is known."""
        idle = [stage for stage in range(self.stages) if self.order[stage] and stage not in self.running]
        ready = [(self._ready(stage, self.order[stage][-1]), stage) for stage in idle]
        return [(max(when, self.free[stage]), stage) for when, stage in ready if when is not None]

    def _duration(self, stage: int, step: Pass) -> Duration:
        return self.durations[stage][step.is_forward, step.chunk]

    def _end(self, stage: int, ended: Running) -> None:
        """Its work is done; what is exposed of its communication follows."""
        duration = self._duration(stage, ended.step)
        self.slowed[stage] += max(0.0, self.now - ended.since - duration.compute)
        message = self.border if self._sends(stage, ended.step) else 0.0
        self.transferred[stage] += message
        self.free[stage] = self.done[stage, ended.step] = self.now + duration.exposed + message

    def _sends(self, stage: int, step: Pass) -> bool:
        edge = (self.stages - 1, self.chunks - 1) if step.is_forward else (0, 0)
        return self.stages > 1 and (stage, step.chunk) != edge

    def _ready(self, stage: int, step: Pass) -> float | None:
        """When what the pass needs is there; None: not known yet."""
        is_forward, chunk, micro = step
        if is_forward:
            if stage == 0 and chunk == 0:
                return 0.0
            source = (stage - 1, Pass(True, chunk, micro)) if stage else (self.stages - 1, Pass(True, chunk - 1, micro))
        elif stage == self.stages - 1 and chunk == self.chunks - 1:
            source = (stage, Pass(True, chunk, micro))
        else:
            back = stage == self.stages - 1
            source = (0, Pass(False, chunk + 1, micro)) if back else (stage + 1, Pass(False, chunk, micro))
        return self.done.get(source)
