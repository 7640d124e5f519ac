"""Who holds which layers and how many tokens: what all other parts of the predictor start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lsys.config.methods import ITEMSIZE, attention_methods
from lsys.config.schema import Config
from lsys.mixers.card import Card, Layer, Place
from lsys.mixers.channel import ChannelCard
from lsys.mixers.exchange import Halo, Ranks
from lsys.parallel.mesh import Mesh
from lsys.parallel.messages.heads import Groups, alone
from lsys.parallel.methods import SOFTMAX, STATE, Method


@dataclass(frozen=True)
class Deployment:
    """A configuration on a number of ranks.

    Attributes:
        config: it passes `lsys.config.rules.check` for this many ranks.
        ranks_per_node: nodes are filled one after the other.
        gpu: whether ranks compute on GPUs: there gradients overlap by default, and NCCL carries messages.
        lengths: tokens of each document of a micro-batch; None is one document as long as it, which costs most.
    """

    config: Config
    world_size: int
    ranks_per_node: int = 8
    gpu: bool = True
    lengths: tuple[int, ...] | None = None

    @cached_property
    def mesh(self) -> Mesh:
        return Mesh.of(self.config.parallel, self.world_size)

    @cached_property
    def nodes(self) -> list[int]:
        return self.mesh.nodes(self.ranks_per_node)

    @property
    def backend(self) -> str:
        return "nccl" if self.gpu else "gloo"

    @property
    def overlap(self) -> bool:
        """Whether gradients are reduced while others are computed."""
        wanted = self.config.train.overlap
        return self.gpu if wanted is None else wanted

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the model."""
        return ITEMSIZE[self.config.train.precision]

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, and share out the optimizer's states."""
        return self.mesh.data * self.mesh.context

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one replica in a step."""
        return self.config.micro_batches // self.mesh.data

    @property
    def documents(self) -> tuple[int, ...]:
        return self.lengths or (self.config.train.micro_batch_tokens,)

    @property
    def slots(self) -> int:
        """Token slots of a context rank, a multiple of the tensor degree (`lsys.data.plan.Planner.slots`)."""
        share = -(-self.config.train.micro_batch_tokens // self.mesh.context)
        return -(-share // self.mesh.tensor) * self.mesh.tensor

    @cached_property
    def context_nodes(self) -> list[int]:
        """Nodes of the context ranks."""
        return [self.nodes[rank] for rank in self.mesh.peers(0, "context")]

    @cached_property
    def cards(self) -> dict[str, Card]:
        """The cards of the token mixers that there are."""
        return self.config.model.cards

    @cached_property
    def channels(self) -> dict[str, ChannelCard]:
        """The cards of the channel mixers that there are."""
        return self.config.model.channel_cards

    @cached_property
    def methods(self) -> dict[str, Method]:
        """How a token mixer crosses the context ranks."""
        taken = attention_methods(self.config, self.context_nodes)
        state = STATE[self.config.parallel.linear]
        return {kind: state if card.has_state else SOFTMAX[taken[kind]] for kind, card in self.cards.items()}

    @cached_property
    def ranks(self) -> Ranks:
        """The context ranks, and the documents that lie on them."""
        parallel = self.config.parallel
        return Ranks(parallel.layout, self.documents, tuple(self.context_nodes), self.backend, self.itemsize)

    def place(self, layer: Layer | None = None) -> Place:
        """Where a token mixer runs, as far as its bytes depend on it; None: a channel mixer, whose tokens stay where they are."""
        if layer is None:
            return Place(self.itemsize, self.gpu, self.mesh.tensor, is_sent=False)
        is_sent = len(self.groups(layer.mixer)[0]) > 1
        return Place(self.itemsize, self.gpu, self.mesh.tensor, is_sent, layer.is_first)

    def groups(self, kind: str) -> Groups:
        """The groups of context ranks inside which a token mixer's heads are exchanged for tokens."""
        exchanges = self.cards[kind].exchanges(self.mesh.tensor)
        heads = [each.heads for each in exchanges if not isinstance(each, Halo)]
        return self.methods[kind].groups(self.context_nodes, heads[0]) if heads else alone(self.context_nodes, 0)

    # ---- layers

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The kinds of the layers of the whole model."""
        mixers = self.config.model.kinds
        firsts = {mixers.index(kind) for kind, card in self.cards.items() if card.is_first_apart}
        kinds = enumerate(self.config.model.layer_kinds)
        return tuple(kind._replace(is_first=number in firsts) for number, kind in kinds)

    @property
    def chunks(self) -> int:
        """Virtual chunks of a stage."""
        return self.config.parallel.virtual_pipeline

    def kinds(self, stage: int, chunk: int = 0) -> tuple[Layer, ...]:
        """Kinds of the layers of a virtual chunk: chunk v of stage p of P is number v P + p of the P V chunks."""
        stages, model = self.mesh.pipeline, self.config.model
        each = model.layers // (stages * self.chunks)
        first = (chunk * stages + stage) * each
        return self.layers[first : first + each]

    def alike(self, stage: int) -> tuple[tuple[tuple[Layer, ...], ...], bool, bool]:
        """What two stages must share to need and take the same."""
        return tuple(self.kinds(stage, v) for v in range(self.chunks)), stage == 0, stage == self.mesh.pipeline - 1

    def is_first(self, stage: int, chunk: int = 0) -> bool:
        """Whether it has the embedding."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int | None = None) -> bool:
        """Whether it has the output layer."""
        return stage == self.mesh.pipeline - 1 and chunk in (None, self.chunks - 1)

    # ---- ranks

    def rank(self, stage: int, context: int = 0, data: int = 0, tensor: int = 0) -> int:
        return self.mesh.rank(tensor=tensor, context=context, data=data, pipeline=stage)

    def group(self, axis: str, rank: int) -> Sequence[int]:
        """The ranks of the process group of an axis that this rank is in, in its order: as Megatron's."""
        mesh, place = self.mesh, self.mesh.coordinates(rank)
        if axis == "replicas":  # data x context
            first = mesh.rank(tensor=place["tensor"], pipeline=place["pipeline"])
            return range(first, first + self.replicas * mesh.tensor, mesh.tensor)
        if axis == "model":  # tensor x pipeline
            return [
                mesh.rank(**{**place, "tensor": tensor, "pipeline": stage})
                for stage in range(mesh.pipeline)
                for tensor in range(mesh.tensor)
            ]
        return range(self.world_size) if axis == "world" else mesh.peers(rank, axis)
