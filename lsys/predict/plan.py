"""A configuration on a number of ranks of some hardware: what it needs, whether that fits, how fast it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lsys.config.schema import Config
from lsys.observe.flops import training_flops
from lsys.predict.activations import Activations, Peak
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import Hardware
from lsys.predict.seconds import Prediction, StepTime
from lsys.predict.traffic import Bytes, StepTraffic
from lsys.predict.weights import Weights, weights


@dataclass(frozen=True)
class Plan:
    """What `lsys check` says.

    Attributes:
        config: it passes `lsys.config.rules.check` for this many ranks.
    """

    config: Config
    world_size: int
    hardware: Hardware

    @cached_property
    def deployment(self) -> Deployment:
        return Deployment(self.config, self.world_size, self.hardware.ranks_per_node, self.hardware.gpu)

    # ---- memory

    @cached_property
    def weights(self) -> tuple[Weights, ...]:
        """Bytes of parameters, gradients and optimizer by stage, of the first of its ranks."""
        return tuple(weights(self.deployment, stage) for stage in range(self.deployment.mesh.pipeline))

    @cached_property
    def activations(self) -> tuple[Peak, ...]:
        """Bytes of activations at the peak, by stage."""
        activations = Activations(self.deployment)
        return tuple(activations.peak(stage) for stage in range(self.deployment.mesh.pipeline))

    @cached_property
    def memory(self) -> tuple[float, ...]:
        """Bytes of a rank at the peak, by stage."""
        both = zip(self.weights, self.activations, strict=True)
        return tuple(held.parameters + held.gradients + held.optimizer + peak.total for held, peak in both)

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory; so it is where that is not known."""
        return self.hardware.memory is None or max(self.memory) <= self.hardware.memory

    # ---- bytes and time

    def traffic(self) -> dict[str, Bytes]:
        """Bytes by axis, of the rank that receives most among one of each kind of stages; of hundreds of context ranks, among the first 128."""
        mesh, step = self.deployment.mesh, StepTraffic(self.deployment)
        most: dict[str, tuple[int, Bytes]] = {}
        distinct = {self.deployment.alike(stage): stage for stage in range(mesh.pipeline)}.values()
        ends = {
            mesh.rank(tensor=tensor, context=context, data=data, pipeline=stage)
            for stage in distinct
            for context in range(min(mesh.context, 128))
            for tensor in {0, mesh.tensor - 1}
            for data in {0, mesh.data - 1}
        }
        for rank in sorted(ends):
            moved = step.bytes(rank)
            for axis in {axis for axis, *_ in moved}:
                total = moved.moved(axis)
                if axis not in most or total > most[axis][0]:
                    most[axis] = total, moved
        return {axis: moved for axis, (_, moved) in most.items()}

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted step; the hardware's rates must be known."""
        return StepTime(self.deployment, self.hardware).predict()

    @property
    def mfu(self) -> float | None:
        """Model FLOPs of a step over what the ranks could do in its time; None where their peak is not known."""
        peak = self.hardware.peak.get(self.config.train.precision)
        if not peak:
            return None
        flops = training_flops(self.config.model, self.deployment.documents) * self.config.micro_batches
        return flops / (self.prediction.seconds * peak * self.world_size)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of one rank."""
        return self.config.train.batch_tokens / self.prediction.seconds / self.world_size

    @property
    def hours(self) -> float:
        """Hours of the run, without validation, checkpoints and what goes wrong."""
        return self.config.train.steps * self.prediction.seconds / 3600
