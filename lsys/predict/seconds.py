"""The time of a training step and where it goes, by simulating the pipeline's schedule.

A pass of a micro-batch through a chunk takes its work at the hardware's rates, its tensor parallel communication as far as Megatron
does not hide it behind products, and what is left of its context communication when as much of it as the hardware overlaps has
hidden behind the mixers' work. It starts when the stage is free and what it needs has come from the stage before (or, backward,
behind). After the last pass come gradients, norm, optimizer and parameters; with overlap the first and last hide behind backward and
forward passes.

One transfer: a latency a step of its algorithm, and what the busiest port moves over its bandwidth (lsys.parallel.replay.cost).
Where ranks outnumber a node's cores, those that compute at the same time share them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lsys.parallel.links import NETWORK, NODE
from lsys.parallel.messages import Phase, Phases
from lsys.parallel.traffic import Operation, traffic
from lsys.predict.hardware import Hardware
from lsys.predict.schedule import Pass, passes
from lsys.predict.shape import Shape
from lsys.predict.traffic import Issued, StepTraffic
from lsys.predict.weights import in_width
from lsys.predict.work import StageWork

AXES = ("tensor", "context", "pipeline", "data", "model")


@dataclass(frozen=True)
class Prediction:
    """Of a step.

    Attributes:
        seconds: of the step.
        parts: s by the waterfall's names; they sum to `seconds`.
    """

    seconds: float
    parts: dict[str, float]

    @property
    def percent(self) -> dict[str, float]:
        return {name: 100 * part / self.seconds for name, part in self.parts.items()}


@dataclass(frozen=True)
class Duration:
    """Of one pass, s: the work of the rank that has most, the mean of ranks, and what is exposed of communication."""

    compute: float
    mean: float
    tensor: float
    context: float

    @property
    def exposed(self) -> float:
        return self.tensor + self.context


class StepTime:
    """Predicts the step of a configuration on hardware whose rates are known."""

    def __init__(self, shape: Shape, hardware: Hardware) -> None:
        self.shape, self.config, self.hardware = shape, shape.config, hardware
        self.traffic, self.work = StepTraffic(shape), StageWork(shape)
        self._layers: dict[tuple[str, bool], tuple[float, float]] = {}
        self._alike: dict[object, dict[tuple[bool, int], Duration]] = {}

    # ---- transfers

    def operation(self, issued: Issued, rank: int) -> float:
        """Seconds of one operation."""
        ranks, kind, nodes = issued.ranks, issued.operation.kind, self.shape.nodes
        if len(ranks) == 1:
            return self.hardware.call
        moved = traffic(issued.operation, ranks.index(rank), len(ranks), self.shape.backend)
        bytes_by: dict[str, int] = {NODE: 0, NETWORK: 0}
        for peer, size in moved.sent.items():
            bytes_by[NODE if nodes[ranks[peer]] == nodes[rank] else NETWORK] += size
        crosses = len({nodes[r] for r in ranks}) > 1
        if crosses and kind in ("all_gather", "reduce_scatter", "all_reduce", "broadcast"):  # some rank's port crosses
            bytes_by = {
                NODE: 0,
                NETWORK: max(sum(bytes_by.values()), issued.operation.bytes if kind == "broadcast" else 0),
            }
        links = self.hardware.links
        busy = max(size / links[link].bandwidth for link, size in bytes_by.items() if link in links)
        steps = {"all_reduce": 2 * (len(ranks) - 1), "broadcast": (len(ranks) - 1).bit_length(), "send": 1, "recv": 0}
        hops = steps.get(kind, len(ranks) - 1)
        inside = links[NODE].latency if NODE in links else 0.0
        far = len({nodes[r] for r in ranks}) - 1
        latency = (
            hops * inside
            if not crosses
            else min(hops, 2 * far) * links[NETWORK].latency + max(0, hops - 2 * far) * inside
        )
        return self.hardware.call + latency + busy

    def operations(self, found: Iterable[Issued], rank: int) -> float:
        return sum(issued.times * self.operation(issued, rank) for issued in found if issued.times)

    def phase(self, phase: Phase) -> float:
        """Seconds of context messages that are under way together: the busiest rank's."""
        nodes, links = self.traffic.context_nodes, self.hardware.links
        busy: dict[tuple[int, int, str], int] = {}
        peers: dict[int, set[int]] = {}
        for source, destination, size in phase:
            link = NODE if nodes[source] == nodes[destination] else NETWORK
            for end, way in ((source, 0), (destination, 1)):
                busy[end, way, link] = busy.get((end, way, link), 0) + size
            peers.setdefault(source, set()).add(destination)
        latency = max((links[link].latency for *_, link in busy), default=0.0)
        calls = max(map(len, peers.values()), default=0) * self.hardware.call
        return latency + calls + max((size / links[link].bandwidth for (*_, link), size in busy.items()), default=0.0)

    # ---- passes

    def mixer_exchange(self, kind: str, is_first: bool) -> tuple[float, float]:
        """Seconds that one layer's context communication takes, forward and backward."""
        key = (kind, is_first)
        if key not in self._layers:
            found: list[Phases] = self.traffic.layer_phases(*key)
            self._layers[key] = tuple(sum(self.phase(p) for ways in found for p in ways[way]) for way in (0, 1))  # type: ignore[assignment]
        return self._layers[key]

    def durations(self, stage: int) -> dict[tuple[bool, int], Duration]:
        """Of the passes of a stage by (is forward, chunk)."""
        first = self.traffic.first_linear
        key = (self.shape.alike(stage), first is not None and first[0] == stage)
        if key not in self._alike:
            self._alike[key] = self._durations(stage)
        return self._alike[key]

    def _durations(self, stage: int) -> dict[tuple[bool, int], Duration]:
        shape, found = self.shape, {}
        context, methods = shape.mesh.context, self.traffic.methods
        rank, hardware = shape.rank(stage), self.hardware
        again = self.config.train.recompute
        for chunk in range(shape.chunks):
            works = [self.work.chunk(stage, chunk, methods, most) for most in (True, False)]
            tensor = self.tensor_seconds(rank, stage, chunk)
            exchange = [0.0, 0.0]
            for number, kind in enumerate(shape.kinds(stage, chunk)):
                is_first = kind == "L" and self.traffic.first_linear == (stage, chunk, number)
                there, back = self.mixer_exchange(kind, is_first) if context > 1 else (0.0, 0.0)
                hides = hardware.overlap * hardware.seconds(self.work.mixer(kind, methods, False))
                exchange[0] += max(0.0, there - hides)
                exchange[1] += max(0.0, back - 2 * hides) + (max(0.0, there - hides) if again != "none" else 0.0)
            for way in (0, 1):
                most, mean = (hardware.seconds(work[way]) for work in works)
                found[way == 0, chunk] = Duration(most, mean, tensor[way], exchange[way])
        return found

    def tensor_seconds(self, rank: int, stage: int, chunk: int) -> tuple[float, float]:
        """Of one micro-batch through a chunk, forward and backward."""
        shape, model = self.shape, self.config.model
        if shape.mesh.tensor == 1:
            return 0.0, 0.0
        ranks, kinds = tuple(shape.group("tensor", rank)), shape.kinds(stage, chunk)
        whole = shape.slots * model.hidden * shape.itemsize
        gather = self.operation(Issued("tensor", ranks, Operation("all_gather", whole // len(ranks)), 1), rank)
        scatter = self.operation(Issued("tensor", ranks, Operation("reduce_scatter", whole), 1), rank)
        layers = len(kinds) * (2 * gather + 2 * scatter)
        there, back = layers, len(kinds) * 2 * gather
        back += layers if self.config.train.recompute == "full" else 0
        # Backward, projections into heads and channels gather behind one product and scatter behind another
        # (`LinearWithGradAccumulationAndAsyncCommunication` of megatron/core/tensor_parallel/layers.py).
        product = 2.0 * shape.slots * model.hidden / shape.mesh.tensor * self.hardware.costs.get("matmul", 0.0)
        for width in (2 * model.ffn_width, *(in_width(self.config, kind) for kind in kinds)):
            times = len(kinds) if width == 2 * model.ffn_width else 1
            back += times * (max(0.0, gather - width * product) + max(0.0, scatter - width * product))
        if shape.is_first(stage, chunk):
            there, back = there + scatter, back + gather
        if shape.is_last(stage, chunk):
            sums = Issued("tensor", ranks, Operation("all_reduce", 4 * shape.slots), 1)
            there += gather + (4 if self.config.train.z_loss else 3) * self.operation(sums, rank)
            back += gather + scatter
        return there, back

    # ---- the step

    def predict(self) -> Prediction:
        """The time of a step and its parts: means over the ranks."""
        shape, stages = self.shape, self.shape.mesh.pipeline
        durations = [self.durations(stage) for stage in range(stages)]
        border = 0.0
        if stages > 1:
            ranks = tuple(shape.group("pipeline", 0))
            border = self.operation(Issued("pipeline", ranks, Operation("send", self.traffic.border_bytes, 1), 1), 0)
        timeline = Timeline(self, durations, border)
        makespan = timeline.run()
        parts = dict.fromkeys(("compute", *(f"exposed_{axis}" for axis in AXES), "imbalance", "bubble"), 0.0)
        parts |= dict.fromkeys(("data", "checkpoint", "core", "report", "other"), 0.0)
        for stage in range(stages):
            own = dict.fromkeys(parts, 0.0)
            times = shape.micro_batches
            for duration in durations[stage].values():
                own["compute"] += times * duration.mean
                own["imbalance"] += times * (duration.compute - duration.mean)
                own["exposed_tensor"] += times * duration.tensor
                own["exposed_context"] += times * duration.context
            own["core"] = timeline.slowed[stage]
            own["exposed_pipeline"] = timeline.transferred[stage]
            own["bubble"] = max(0.0, makespan - sum(own.values()))
            for name, value in own.items():
                parts[name] += value / stages
        self._end(parts, durations)
        return Prediction(sum(parts.values()), parts)

    def _end(self, parts: dict[str, float], durations: list[dict[tuple[bool, int], Duration]]) -> None:
        """Adds what follows the last backward pass, where the stage that takes longest sets the pace."""
        shape, hardware, stages = self.shape, self.hardware, range(self.shape.mesh.pipeline)
        updates = [hardware.seconds(self.work.update(stage)) for stage in stages]
        mean = sum(updates) / len(updates)
        distinct = {shape.alike(stage): stage for stage in stages}.values()
        shared = self._sharing()
        parts["compute"] += mean
        parts["imbalance"] += max(updates) - mean
        parts["core"] += (shared - 1) * max(updates)
        exposed, sums = [], []
        for stage in distinct:
            rank = shape.rank(stage)
            issued = list(self.traffic.operations(rank))
            big = self.operations((i for i in issued if i.axis == "data"), rank)
            if shape.overlap:  # behind the last backward pass, and the next first forward pass
                last = durations[stage]
                big = max(0.0, big - last[False, 0].compute * (1 if stage == 0 else 0) - last[True, 0].compute)
            exposed.append(big)
            sums.append(
                [
                    self.operations(
                        (
                            i
                            for i in issued
                            if i.axis == axis
                            and i.operation.kind not in ("send", "recv")
                            and (axis != "tensor" or i.times == 1)
                        ),
                        rank,
                    )
                    for axis in ("pipeline", "model", "world", "tensor")
                ]
            )
        parts["exposed_data"] += max(exposed)
        for axis, column in zip(("pipeline", "model", "model", "tensor"), zip(*sums, strict=True), strict=True):
            parts[f"exposed_{axis}"] += max(column)

    def _sharing(self) -> float:
        """How much slower ranks are when all of a node compute at once."""
        cores, ranks = self.hardware.cores, min(self.shape.ranks_per_node, self.shape.world_size)
        return max(1.0, ranks / cores) if cores else 1.0


class Timeline:
    """The passes of all stages, in simulated time.

    Attributes:
        slowed: s by stage that its ranks waited for a core. transferred: s of messages between stages.
    """

    def __init__(self, step: StepTime, durations: list[dict[tuple[bool, int], Duration]], border: float) -> None:
        shape = step.shape
        self.stages, self.chunks = shape.mesh.pipeline, shape.chunks
        self.durations, self.border = durations, border
        self.order = [passes(self.stages, s, self.chunks, shape.micro_batches) for s in range(self.stages)]
        ranks = shape.world_size // self.stages
        self.weight, cores = min(ranks, shape.ranks_per_node), step.hardware.cores
        self.cores = cores or float("inf")
        self.slowed, self.transferred = [0.0] * self.stages, [0.0] * self.stages

    def run(self) -> float:
        """When the last pass ends."""
        done: dict[tuple[int, Pass], float] = {}  # when what the next stage needs is on its way
        at, now = [0] * self.stages, 0.0
        free = [0.0] * self.stages
        running: dict[int, list[float]] = {}  # by stage, work left and since when
        while any(at[s] < len(self.order[s]) for s in range(self.stages)):
            starts = []
            for stage in range(self.stages):
                if stage in running or at[stage] == len(self.order[stage]):
                    continue
                ready = self._ready(stage, self.order[stage][at[stage]], done)
                if ready is not None:
                    starts.append((max(ready, free[stage]), stage))
            speed = min(1.0, self.cores / max(1, len(running) * self.weight))
            ends = [(now + left / speed, stage) for stage, (left, _) in running.items()]
            when, stage = min(starts + ends)
            for other in running:
                running[other][0] -= (when - now) * speed
            now = max(now, when)
            if stage in running:
                step = self.order[stage][at[stage]]
                duration = self.durations[stage][step.is_forward, step.chunk]
                self.slowed[stage] += max(0.0, now - running.pop(stage)[1] - duration.compute)
                at[stage] += 1
                end = now + duration.exposed
                if self._sends(stage, step):
                    end += self.border
                    self.transferred[stage] += self.border
                free[stage] = done[stage, step] = end
            else:
                step = self.order[stage][at[stage]]
                running[stage] = [self.durations[stage][step.is_forward, step.chunk].compute, now]
        return max(done.values())

    def _sends(self, stage: int, step: Pass) -> bool:
        edge = (self.stages - 1, self.chunks - 1) if step.is_forward else (0, 0)
        return self.stages > 1 and (stage, step.chunk) != edge

    def _ready(self, stage: int, step: Pass, done: dict[tuple[int, Pass], float]) -> float | None:
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
        return done.get(source)
