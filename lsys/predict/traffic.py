"""Every byte that a step moves, by axis and link class: what the ledger would count, exactly.

Of one micro-batch on a rank, with s slots, hidden width h, tensor degree t (sequence parallelism: between layers each tensor rank
has s / t slots; Korthikanti et al., 2022) and elements of b bytes:

    a projection into heads or channels   gathers s h b before it; backward gathers its input again and scatters its gradient
    a projection out of them              scatters s h b behind it; backward gathers
    embedding, output layer               as the latter, as the former
    cross-entropy                         three sums of s fp32 elements over the tensor ranks, a fourth with z-loss
    a mixer over context ranks            lsys.parallel.messages, forward and backward
    a stage's border                      s h b / t, sent and received

Recomputing a layer repeats its forward pass, but for nothing of the output layer. Once a step: gradients and parameters over the
data x context ranks, bucket by bucket; sums over tensor ranks of the gradients of norms; over first and last stage of a tied
embedding's; and scalars: tokens, losses and what layers report, the norm and whether it is finite, and whether to stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from lsys.config.losses import final, layer_losses
from lsys.config.reports import NUMBER, Slots, declared
from lsys.parallel.links import NETWORK, NODE
from lsys.parallel.messages import Phases
from lsys.parallel.traffic import Operation, traffic
from lsys.predict.deployment import Deployment
from lsys.predict.weights import weights


@dataclass(frozen=True)
class Issued:
    """An operation that a rank issues so many times in a step: of which axis, over which ranks."""

    axis: str
    ranks: tuple[int, ...]
    operation: Operation
    times: int


class Bytes(Counter[tuple[str, str, str]]):
    """Bytes by (axis, link class, "sent" or "received")."""

    def moved(self, axis: str | None = None, link: str | None = None, way: str = "received") -> int:
        """Bytes of this selection; None takes all."""
        return sum(n for (a, k, w), n in self.items() if w == way and axis in (None, a) and link in (None, k))


class StepTraffic:
    """What the ranks of a configuration move in a step."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment, self.config = deployment, deployment.config
        self.messages = Slots(declared(deployment.config)).messages  # of what layers and losses report

    def bytes(self, rank: int) -> Bytes:
        """Bytes that one rank moves in a training step."""
        total, nodes = Bytes(), self.deployment.nodes
        for issued in self.operations(rank):
            place = issued.ranks.index(rank)
            moved = traffic(issued.operation, place, len(issued.ranks), self.deployment.backend)
            for way, by_peer in moved._asdict().items():
                for peer, size in by_peer.items():
                    link = NODE if nodes[issued.ranks[peer]] == nodes[rank] else NETWORK
                    total[issued.axis, link, way] += issued.times * size
        for phase, times in self.context_phases(rank):
            self._add(total, phase, times, rank)
        return Bytes({key: size for key, size in total.items() if size})

    def _add(self, total: Bytes, phase: Iterable[tuple[int, int, int]], times: int, rank: int) -> None:
        peers, nodes = self.deployment.mesh.peers(rank, "context"), self.deployment.nodes
        mine = peers.index(rank)
        for source, destination, size in phase:
            link = NODE if nodes[peers[source]] == nodes[peers[destination]] else NETWORK
            if source == mine:
                total["context", link, "sent"] += times * size
            elif destination == mine:
                total["context", link, "received"] += times * size

    # ---- operations that all ranks of a group issue alike

    def operations(self, rank: int) -> Iterator[Issued]:
        """All but the context ranks' exchanges."""
        stage = self.deployment.mesh.coordinate(rank, "pipeline")
        yield from self._tensor(rank, stage)
        yield from self._pipeline(rank, stage)
        yield from self.once(rank)

    def once(self, rank: int) -> Iterator[Issued]:
        """Operations that come once a step and not with every micro-batch."""
        deployment, stage = self.deployment, self.deployment.mesh.coordinate(rank, "pipeline")
        stages, held = tuple(deployment.group("pipeline", rank)), weights(deployment, stage)
        yield Issued("pipeline", stages, Operation("broadcast", 4, len(stages) - 1), 1)  # tokens
        if added := layer_losses(self.config):  # the targets, and what each of them is divided by
            yield self._issued("data", rank, Operation("all_reduce", NUMBER * (1 + len(added))), 1, "replicas")
        for message in self.messages:
            once = (
                ("broadcast", message.bytes, len(stages) - 1) if message.last_stage else ("all_reduce", message.bytes)
            )
            yield Issued("pipeline", stages, Operation(*once), 1)
            if message.over_tensor:
                yield self._issued("tensor", rank, Operation("all_reduce", message.bytes), 1)
        if len(stages) > 1 and held.shared:
            yield Issued("pipeline", (stages[0], stages[-1]), Operation("all_reduce", 4 * held.shared), 1)
        if held.summed:
            yield self._issued("tensor", rank, Operation("all_reduce", 4 * held.summed), 1)
        yield from self._data(rank, stage)
        yield self._issued("model", rank, Operation("all_reduce", 4), 1, self.norm_axis)  # the gradients' norm
        if not self.config.optimizer.distributed and deployment.replicas > 1:  # whether each replica found it finite
            yield self._issued("data", rank, Operation("all_reduce", 8), 1, "replicas")
        yield Issued("world", tuple(range(deployment.world_size)), Operation("all_reduce", 8), 1)  # whether to stop

    @property
    def norm_axis(self) -> str:
        """Over whom the norm of gradients is summed: the distributed optimizer's shards are everywhere."""
        return "world" if self.config.optimizer.distributed else "model"

    def _issued(self, axis: str, rank: int, operation: Operation, times: int, group: str | None = None) -> Issued:
        return Issued(axis, tuple(self.deployment.group(group or axis, rank)), operation, times)

    def _tensor(self, rank: int, stage: int) -> Iterator[Issued]:
        deployment = self.deployment
        whole = deployment.slots * self.config.model.hidden * deployment.itemsize
        gathers = scatters = 0
        sums: tuple[int, ...] = ()
        low_ranks: list[int] = []
        for chunk in range(deployment.chunks):
            kinds = deployment.kinds(stage, chunk)
            again = 2 if self.config.train.recompute == "full" else 1
            pairs = sum(1 + len(deployment.channels[kind.channels].in_widths()) for kind in kinds)
            gathers += (again + 2) * pairs  # projections in; their inputs again; those out, backward
            scatters += (again + 1) * pairs
            low_ranks += [each.rank for kind in kinds for each in deployment.cards[kind.mixer].low_ranks()]
            if deployment.is_first(stage, chunk):
                gathers, scatters = gathers + 1, scatters + 1
            if deployment.is_last(stage, chunk):
                gathers, scatters = gathers + final(self.config).gathers, scatters + 1
                sums += final(self.config).reductions(self.config.train.z_loss)
        times, part = deployment.micro_batches, whole // deployment.mesh.tensor
        yield self._issued("tensor", rank, Operation("all_gather", part), gathers * times)
        yield self._issued("tensor", rank, Operation("reduce_scatter", whole), scatters * times)
        for size, each in Counter(sums).items():
            yield self._issued("tensor", rank, Operation("all_reduce", size * deployment.slots), each * times)
        for rank_, layers in Counter(low_ranks).items():  # gathered between their two products
            rows = deployment.slots * rank_ * deployment.itemsize
            again = 3 if self.config.train.recompute == "full" else 2
            operation = Operation("all_gather", rows // deployment.mesh.tensor)
            yield self._issued("tensor", rank, operation, again * layers * times)
            yield self._issued("tensor", rank, Operation("reduce_scatter", rows), layers * times)

    def _pipeline(self, rank: int, stage: int) -> Iterator[Issued]:
        deployment, ranks = self.deployment, tuple(self.deployment.group("pipeline", rank))
        stages = len(ranks)
        if stages == 1:
            return
        size, each = self.border_bytes, deployment.micro_batches
        up, down = (stage + 1) % stages, (stage - 1) % stages
        for chunk in range(deployment.chunks):
            if not deployment.is_last(stage, chunk):  # outputs go up, their gradients come back
                yield Issued("pipeline", ranks, Operation("send", size, up), each)
                yield Issued("pipeline", ranks, Operation("recv", size, up), each)
            if not deployment.is_first(stage, chunk):
                yield Issued("pipeline", ranks, Operation("recv", size, down), each)
                yield Issued("pipeline", ranks, Operation("send", size, down), each)

    @property
    def border_bytes(self) -> int:
        """Bytes of a micro-batch between two stages."""
        deployment = self.deployment
        return deployment.slots // deployment.mesh.tensor * self.config.model.hidden * deployment.itemsize

    def _data(self, rank: int, stage: int) -> Iterator[Issued]:
        for size in (4, *(message.bytes for message in self.messages)):
            yield self._issued("data", rank, Operation("all_reduce", size), 1, "replicas")
        for bucket in (bucket for chunk in weights(self.deployment, stage).buckets for bucket in chunk):
            if self.config.optimizer.distributed:
                part = bucket // self.deployment.replicas * self.deployment.itemsize
                yield self._issued("data", rank, Operation("reduce_scatter", 4 * bucket), 1, "replicas")
                yield self._issued("data", rank, Operation("all_gather", part), 1, "replicas")
            else:
                yield self._issued("data", rank, Operation("all_reduce", 4 * bucket), 1, "replicas")

    # ---- exchanges between context ranks

    def channel_phases(self, kind: str) -> list[Phases]:
        """What the channel mixer of one layer exchanges, in order."""
        if self.deployment.mesh.context == 1:
            return []
        exchanges = self.deployment.channels[kind].exchanges(self.config.parallel.tensor)
        return [each.phases(None, self.deployment.ranks) for each in exchanges]

    def layer_phases(self, kind: str, is_first: bool = False) -> list[Phases]:
        """What a token mixer exchanges, in order: the halo of a short convolution, its messages; is_first: the first of its kind."""
        if self.deployment.mesh.context == 1:
            return []
        method, ranks = self.deployment.methods[kind], self.deployment.ranks
        exchanges = self.deployment.cards[kind].exchanges(self.config.parallel.tensor, is_first)
        return [each.phases(method, ranks) for each in exchanges]

    @cached_property
    def _phases(self) -> dict[tuple[str, bool], list[Phases]]:
        stages = range(self.deployment.mesh.pipeline)
        return {key: self.layer_phases(*key) for key in dict.fromkeys(k for s in stages for k in self.layer_counts(s))}

    def context_phases(self, rank: int) -> Iterator[tuple[Sequence[tuple[int, int, int]], int]]:
        """The phases of all layers of the rank's stage, and how often each happens in a step."""
        deployment, stage = self.deployment, self.deployment.mesh.coordinate(rank, "pipeline")
        again = 1 if self.config.train.recompute == "none" else 2
        found = [(each, n, again) for key, n in self.layer_counts(stage).items() for each in self._phases[key]]
        again = 2 if self.config.train.recompute == "full" else 1  # selective recompute is of token mixers
        found += [(each, n, again) for key, n in self._channel_counts(stage) for each in self.channel_phases(key)]
        for phases, layers, times in found:
            for phase in phases.forward:
                yield phase, layers * times * deployment.micro_batches
            for phase in phases.backward:
                yield phase, layers * deployment.micro_batches

    def _channel_counts(self, stage: int) -> Iterable[tuple[str, int]]:
        """Layers of a stage by their channel mixers."""
        chunks = range(self.deployment.chunks)
        return Counter(kind.channels for chunk in chunks for kind in self.deployment.kinds(stage, chunk)).items()

    def layer_counts(self, stage: int) -> Counter[tuple[str, bool]]:
        """Layers of a stage by (token mixer, whether it is the first of it and not as the others)."""
        chunks = range(self.deployment.chunks)
        return Counter((kind.mixer, kind.is_first) for chunk in chunks for kind in self.deployment.kinds(stage, chunk))
