"""How much a rank has to do, in the quantities that hardware has rates for: one vocabulary for data sheets and calibrations.

    matmul                    FLOPs of products with weights
    attention                 FLOPs of softmax attention: 4 H D for each query and key that it sees (2.5 times as many backward)
    kernel:K, linked:K        bytes of intermediate results in the mixer with the symbol K; linked: where states cross ranks
    fused:K                   on GPUs that have a kernel for it, instead of these: bytes that this reads and writes at the least
    bytes                     of other activations that layers keep: each is written once and read a few times
    weights                   elements of weights, whose gradients are added up
    tensor                    operations over tensor ranks: what they take their issuer beside the transfer
    logits                    bytes of what the loss makes
    layer:K                   one layer: what it takes whatever its size
    optimizer, tensors        elements that the optimizer updates, parameters that they are in
    gradients                 bytes of gradient buffers
    micro_batch, step         one

A `_backward` after the name is the same quantity in a backward pass, whose rate differs.
"""

from __future__ import annotations

from collections.abc import Mapping

from lsys.config.losses import final
from lsys.mixers.card import Layer
from lsys.mixers.exchange import KeyValues
from lsys.parallel.messages.heads import shares
from lsys.parallel.methods import Method
from lsys.predict.activations import Activations
from lsys.predict.deployment import Deployment
from lsys.predict.kernel_memory import has_external_state, intermediate, is_fused, least
from lsys.predict.weights import weights


class Work(dict[str, float]):
    """Quantities by name; those that are not there are 0."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def __add__(self, other: Work) -> Work:
        return Work({name: self[name] + other[name] for name in {**self, **other}})


def backward(work: Mapping[str, float]) -> Work:
    """Work of the backward pass: products twice, attention's 2.5 times; the rates say the rest."""
    found = Work()
    for name, amount in work.items():
        if name in ("matmul",):
            found[name] += 2 * amount
        elif name == "attention":
            found["attention_backward"] += 2.5 * amount
        else:
            head, _, kind = name.partition(":")
            found[f"{head}_backward:{kind}" if kind else f"{head}_backward"] += amount
    return found


class StageWork:
    """What the ranks of a configuration do, layer by layer."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment, self.config, self.model = deployment, deployment.config, deployment.config.model
        self.activations = Activations(deployment)
        self._mixers: dict[tuple[Layer, bool], Work] = {}
        self._layers: dict[tuple[Layer, bool], Work] = {}

    def mixer(self, kind: Layer, methods: Mapping[str, Method], most: bool = False) -> Work:
        """Work of one layer's token mixer without its projections, forward: mean of the context ranks, or of the one that has most."""
        key = (kind, most)
        if key not in self._mixers:
            layer, card, work, mixer = (
                self.activations.layers[kind],
                self.deployment.cards[kind.mixer],
                Work(),
                kind.mixer,
            )
            if not card.has_state:
                flops = self.attention_flops(mixer, methods[mixer])
                work["attention"] = max(flops) if most else sum(flops) / len(flops)
                work[f"kernel:{card.symbol}"] = layer.before
            elif is_fused(self.deployment, kind):
                work[f"fused:{card.symbol}"] = self.deployment.slots * least(self.deployment, kind)
            else:
                name = "linked" if has_external_state(self.deployment, kind) else "kernel"
                work[f"{name}:{card.symbol}"] = 4.0 * self.deployment.slots * intermediate(self.deployment, kind)
            work["bytes"] = layer.after + layer.middle
            work[f"layer:{card.symbol}"] = 1
            self._mixers[key] = work
        return self._mixers[key]

    def attention_flops(self, kind: str, method: Method) -> list[float]:
        """Forward, by context rank: its share of the heads, and of these the pairs that the queries of its group see.

        A group exchanges heads for tokens: each member has all the group's tokens for some of the heads.
        """
        card, mesh = self.deployment.cards[kind], self.deployment.mesh
        exchanges = [each for each in card.exchanges(mesh.tensor) if isinstance(each, KeyValues)]
        if not exchanges:  # nothing says who computes what: equal parts of what the card says
            return [card.mixing_flops(self.deployment.documents) / (mesh.tensor * mesh.context)] * mesh.context
        flops = [0.0] * mesh.context
        for one in exchanges:
            groups = method.groups(self.deployment.context_nodes, one.heads)
            place, pairs = self.deployment.ranks.placement.pooled(groups), [0] * len(groups)
            for part in place.parts:
                start = part.begin - place.places[part.document]
                pairs[part.rank] += one.mask.visible(start, start + part.length, place.lengths[part.document])
            for group, seen in zip(groups, pairs, strict=True):
                for rank, share in zip(group, shares(one.heads, one.kv_heads, len(group)), strict=True):
                    flops[rank] += 4.0 * one.width * share.queries * seen
        return flops

    def layer(self, kind: Layer, methods: Mapping[str, Method], most: bool = False) -> Work:
        """Work of one layer, forward; most: as of `mixer`."""
        if (kind, most) not in self._layers:
            self._layers[kind, most] = self._layer(kind, methods, most)
        return self._layers[kind, most]

    def _layer(self, kind: Layer, methods: Mapping[str, Method], most: bool) -> Work:
        card, t = self.deployment.cards[kind.mixer], self.deployment.mesh.tensor
        found = self.channels(kind) + Work(
            {"matmul": 2.0 * self.deployment.slots * card.products / t, "weights": card.products / t}
        )
        found["bytes"] += self.activations.layers[kind].entry
        if t > 1:
            found["tensor"] += 2 + len(card.low_ranks())  # what is between their two products is gathered
        return found + self.mixer(kind, methods, most)

    def channels(self, kind: Layer) -> Work:
        """Work of a layer's channel mixer alone, forward."""
        card, t = self.deployment.channels[kind.channels], self.deployment.mesh.tensor
        elements, inside = card.products / t, self.activations.layers[kind].mlp
        found = Work({"matmul": 2.0 * self.deployment.slots * elements, "weights": elements, "bytes": inside})
        if t > 1:
            found["tensor"] += 2 * len(card.in_widths())
        return found

    def output(self) -> Work:
        """Output layer and loss, forward."""
        elements = self.deployment.slots * self.model.padded_vocab / self.deployment.mesh.tensor
        return Work({"matmul": 2.0 * elements * self.model.hidden, "logits": 4.0 * elements})

    def chunk(self, stage: int, chunk: int, methods: Mapping[str, Method], most: bool = False) -> tuple[Work, Work]:
        """Work of one micro-batch through a chunk of a stage: forward, backward (what is recomputed is in it)."""
        forward, again = Work({"micro_batch": 1}), Work()
        for kind in self.deployment.kinds(stage, chunk):
            layer = self.layer(kind, methods, most)
            forward += layer
            if self.config.train.recompute == "full":
                again += layer
            elif self.config.train.recompute == "selective":
                again += self.mixer(kind, methods, most)
        if self.deployment.is_last(stage, chunk):
            forward += self.output()
            if final(self.config).is_recomputed:
                again += self.output()
        return forward, backward(forward) + again

    def update(self, stage: int) -> Work:
        """After the last micro-batch: gradients are cleared, scaled and measured, and the optimizer makes a step."""
        held = weights(self.deployment, stage)
        return Work({"optimizer": held.updated, "tensors": held.tensors, "gradients": held.gradients, "step": 1})
