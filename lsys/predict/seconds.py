"""The time of a training step and where it goes, by simulating the pipeline's schedule.

A pass of a micro-batch through a chunk takes its work at the hardware's rates, its tensor parallel communication as far as Megatron
does not hide it behind products, and what is left of its context communication when as much of it as the hardware overlaps has
hidden behind the mixers' work (`timeline.py`: when passes start; `transfers.py`: what one transfer takes). After the last pass come
gradients, norm, optimizer and parameters; with overlap the first and last hide behind backward and forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lsys.config.losses import final
from lsys.mixers.exchange import Halo
from lsys.observe.waterfall import BUBBLE, COMPUTE, CORE, IMBALANCE, exposed, part_names
from lsys.parallel import mesh
from lsys.parallel.traffic import Operation
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import Hardware
from lsys.predict.timeline import Duration, Durations, Timeline
from lsys.predict.traffic import StepTraffic
from lsys.predict.transfers import Transfers, once
from lsys.predict.work import StageWork

AXES = (*mesh.AXES, "model")  # of communication that takes time
PARTS = part_names(AXES, ranks=2, stages=2, cores=True)
Ways = tuple[float, float]  # forward, backward


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a step.

    Attributes:
        seconds: of the step.
        parts: s by the waterfall's names; they sum to `seconds`.
    """

    seconds: float
    parts: dict[str, float]

    @property
    def percent(self) -> dict[str, float]:
        return {name: 100 * part / self.seconds for name, part in self.parts.items()}


class StepTime:
    """Predicts the step of a configuration on hardware whose rates are known.

    Raises:
        ConfigError: it has none for a mixer of the model.
    """

    def __init__(self, deployment: Deployment, hardware: Hardware) -> None:
        hardware.require(deployment.cards.values())
        self.deployment, self.config, self.hardware = deployment, deployment.config, hardware
        self.traffic, self.work, self.transfers = (
            StepTraffic(deployment),
            StageWork(deployment),
            Transfers(deployment, hardware),
        )
        self._layers: dict[tuple[str, bool], tuple[Ways, Ways]] = {}
        self._alike: dict[object, Durations] = {}

    # ---- passes

    def durations(self, stage: int) -> Durations:
        """Durations of the passes of a stage."""
        key = self.deployment.alike(stage)
        if key not in self._alike:
            found: Durations = {}
            for chunk in range(self.deployment.chunks):
                works = [self.work.chunk(stage, chunk, self.deployment.methods, most) for most in (True, False)]
                tensor, context = self.tensor_seconds(stage, chunk), self.context_seconds(stage, chunk)
                for way in (0, 1):
                    most, mean = (self.hardware.seconds(work[way]) for work in works)
                    found[way == 0, chunk] = Duration(most, mean, tensor[way], context[way])
            self._alike[key] = found
        return self._alike[key]

    def context_seconds(self, stage: int, chunk: int) -> tuple[float, float]:
        """What mixers' work does not hide of one micro-batch's exchanges between context ranks, forward and backward."""
        if self.deployment.mesh.context == 1:
            return 0.0, 0.0
        forward = backward = 0.0
        for kind in self.deployment.kinds(stage, chunk):
            (there, back), (there_beside, back_beside) = self.mixer_exchange(kind.mixer, kind.is_first)
            hides = self.hardware.overlap * self.hardware.seconds(self.work.mixer(kind, self.deployment.methods, False))
            there += max(0.0, there_beside - hides)
            forward += there
            back += max(0.0, back_beside - 2 * hides)
            backward += back + (there if self.config.train.recompute != "none" else 0.0)
            there, back = self.channel_exchange(kind.channels)
            forward += there
            backward += back + (there if self.config.train.recompute == "full" else 0.0)
        return forward, backward

    def channel_exchange(self, kind: str) -> Ways:
        """Seconds that a channel mixer waits for tokens of other ranks, forward and backward."""
        phases = self.traffic.channel_phases(kind)
        forward, backward = (
            sum(self.transfers.phase(phase) for each in phases for phase in each[way]) for way in (0, 1)
        )
        return forward, backward

    def mixer_exchange(self, kind: str, is_first: bool) -> tuple[Ways, Ways]:
        """Seconds that one layer's context communication takes: what the mixer waits for, and what is under way beside its work.

        A mixer waits for tokens before its segment and for heads, which come before its work and go after it.
        """
        key = (kind, is_first)
        if key not in self._layers:
            deployment, method = self.deployment, self.deployment.methods[kind]
            exchanges = deployment.cards[kind].exchanges(deployment.mesh.tensor, is_first)
            waits, beside = [0.0, 0.0], [0.0, 0.0]
            for exchange, phases in zip(exchanges, self.traffic.layer_phases(*key), strict=True):
                own = None if isinstance(exchange, Halo) else exchange
                ends = method.ends if own and len(method.groups(deployment.context_nodes, own.heads)[0]) > 1 else 0
                for way in (0, 1):
                    times = [self.transfers.phase(phase, bool(own) and method.collective) for phase in phases[way]]
                    inner = sum(times[ends : len(times) - ends]) if own else 0.0
                    waits[way] += sum(times) - inner
                    beside[way] += inner
            self._layers[key] = (waits[0], waits[1]), (beside[0], beside[1])
        return self._layers[key]

    def tensor_seconds(self, stage: int, chunk: int) -> tuple[float, float]:
        """Seconds of one micro-batch's tensor parallel communication through a chunk, forward and backward."""
        deployment, hidden = self.deployment, self.config.model.hidden
        if deployment.mesh.tensor == 1:
            return 0.0, 0.0
        kinds, (gather, scatter) = deployment.kinds(stage, chunk), self._gather_scatter(stage, hidden)
        channels = [width for kind in kinds for width in deployment.channels[kind.channels].in_widths()]
        widths = [*(deployment.cards[kind.mixer].in_width for kind in kinds), *channels]
        there, back = len(widths) * (gather + scatter), len(widths) * gather
        back += sum(self._backward_of(stage, hidden, width) for width in widths)
        for each in (each for kind in kinds for each in deployment.cards[kind.mixer].low_ranks()):
            there += self._gather_scatter(stage, each.rank)[0]  # between their two products
            back += self._backward_of(stage, each.rank, each.width)
        back += there if self.config.train.recompute == "full" else 0
        if deployment.is_first(stage, chunk):
            there, back = there + scatter, back + gather
        if deployment.is_last(stage, chunk):
            loss = final(self.config)
            sums = self._over_tensor(stage, Operation("all_reduce", 4 * deployment.slots))
            there += gather + sum(loss.reductions(self.config.train.z_loss)) / 4 * sums
            back += (loss.gathers - 1) * gather + scatter
        return there, back

    def _over_tensor(self, stage: int, operation: Operation) -> float:
        """Seconds of an operation over the tensor ranks of a stage."""
        ranks = self._widest(stage)
        return self.transfers.operation(once("tensor", ranks, operation), ranks[0])

    def _gather_scatter(self, stage: int, width: int) -> Ways:
        """Seconds in which tensor ranks gather so many channels of all slots, and scatter their sums."""
        whole = self.deployment.slots * width * self.deployment.itemsize
        gather = Operation("all_gather", whole // self.deployment.mesh.tensor)
        return self._over_tensor(stage, gather), self._over_tensor(stage, Operation("reduce_scatter", whole))

    def _backward_of(self, stage: int, inner: int, width: int) -> float:
        """Seconds that products do not hide of the backward pass of one from `inner` channels to `width` shared out ones.

        It gathers its input behind one product and scatters its gradient behind another
        (`LinearWithGradAccumulationAndAsyncCommunication` of megatron/core/tensor_parallel/layers.py).
        """
        flops = 2.0 * self.deployment.slots * inner * width / self.deployment.mesh.tensor
        hides = flops * self.hardware.costs.get("matmul", 0.0)
        return sum(max(0.0, seconds - hides) for seconds in self._gather_scatter(stage, inner))

    def _widest(self, stage: int) -> Sequence[int]:
        """The tensor group of a stage that spans most nodes: where the degree does not divide a node, some do."""
        mesh = self.deployment.mesh
        if self.deployment.ranks_per_node % mesh.tensor == 0:
            return self.deployment.group("tensor", self.deployment.rank(stage))
        firsts = (
            self.deployment.rank(stage, context, data) for data in range(mesh.data) for context in range(mesh.context)
        )
        groups = (self.deployment.group("tensor", first) for first in firsts)
        return max(groups, key=lambda group: len({self.deployment.nodes[rank] for rank in group}))

    # ---- the step

    def predict(self) -> Prediction:
        """The time of a step and its parts: means over the ranks."""
        stages = range(self.deployment.mesh.pipeline)
        durations = [self.durations(stage) for stage in stages]
        timeline = Timeline(self.deployment, durations, self._border(), self.hardware.cores)
        makespan = timeline.run()
        each = [self._of_stage(durations[stage], timeline, stage, makespan) for stage in stages]
        parts = {name: sum(own.get(name, 0.0) for own in each) / len(each) for name in PARTS}
        for found in (self._update(), self._communication(durations)):
            for name, seconds in found.items():
                parts[name] += seconds
        return Prediction(sum(parts.values()), parts)

    def _border(self) -> float:
        """Seconds of a message between two stages."""
        if self.deployment.mesh.pipeline == 1:
            return 0.0
        message = Operation("send", self.traffic.border_bytes, 1)
        return self.transfers.operation(once("pipeline", self.deployment.group("pipeline", 0), message), 0)

    def _of_stage(self, durations: Durations, timeline: Timeline, stage: int, makespan: float) -> dict[str, float]:
        """Parts of all passes."""
        times, passes = self.deployment.micro_batches, durations.values()
        parts = {
            COMPUTE: times * sum(duration.mean for duration in passes),
            IMBALANCE: times * sum(duration.compute - duration.mean for duration in passes),
            exposed("tensor"): times * sum(duration.tensor for duration in passes),
            exposed("context"): times * sum(duration.context for duration in passes),
            exposed("pipeline"): timeline.transferred[stage],
            CORE: timeline.slowed[stage],
        }
        return parts | {BUBBLE: max(0.0, makespan - sum(parts.values()))}

    def _update(self) -> dict[str, float]:
        """Parts of the optimizer's step, where the stage that takes longest sets the pace."""
        stages = range(self.deployment.mesh.pipeline)
        updates = [self.hardware.seconds(self.work.update(stage)) for stage in stages]
        mean, most = sum(updates) / len(updates), max(updates)
        ranks, cores = min(self.deployment.ranks_per_node, self.deployment.world_size), self.hardware.cores
        shared = max(1.0, ranks / cores) if cores else 1.0
        return {COMPUTE: mean, IMBALANCE: most - mean, CORE: (shared - 1) * most}

    def _communication(self, durations: list[Durations]) -> dict[str, float]:
        """Seconds of what comes once a step, by part: of each axis the stage that takes longest."""
        distinct = {self.deployment.alike(stage): stage for stage in range(len(durations))}.values()
        each = [self._once(stage, durations[stage]) for stage in distinct]
        return {exposed(axis): max(found[axis] for found in each) for axis in AXES}

    def _once(self, stage: int, durations: Durations) -> dict[str, float]:
        """Seconds by axis of what a stage's ranks issue once a step."""
        rank, found = self.deployment.rank(stage), dict.fromkeys(AXES, 0.0)
        for issued in self.traffic.once(rank):
            axis = "model" if issued.axis == "world" else issued.axis
            found[axis] += self.transfers.operations([issued], rank)
        if self.deployment.overlap:  # behind the last backward pass, and the next first forward pass
            hides = durations[True, 0].compute + (durations[False, 0].compute if stage == 0 else 0.0)
            found["data"] = max(0.0, found["data"] - hides)
        return found
