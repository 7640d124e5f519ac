"""Live tensors of a forward and backward pass, at their peak, on one rank.

What autograd keeps of a layer is counted operation by operation, in bytes a token slot; what is alive only for a moment is counted at
the moments at which a peak can be, all in the first backward pass after the most forward passes: behind the output layer, in the channel
mixer, in the token mixer's kernel. b is the bytes of an element of the model; sums, norms and states are fp32.

    norm of w channels, CPU      b = 4: normalised w, output w            b = 2: fp32 copy 4 w, normalised 4 w, output 2 w
    norm, GPU (fused)            output b w; its input is kept
    SwiGLU of F channels, CPU    2 F in, SiLU F, up + offset F, product F; GPU (fused): 2 F in, product F; others: by their cards

Recomputed layers keep their input alone, recomputed mixers their projections and output. The counts are those of torch operations on
a CPU, measured (tests/predict/test_memory.py); those of fused operations on GPUs are read from their sources.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

from lsys.config.losses import final
from lsys.mixers.card import Layer
from lsys.predict.deployment import Deployment
from lsys.predict.kernel_memory import linear_saved, workspace
from lsys.predict.schedule import in_flight


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer and micro-batch that live until its backward pass.

    Attributes:
        entry: the norm before the mixer, and what projects in two products.
        projected: of the projections' output, what the kernel's backward pass needs. inputs: all that a recomputed mixer keeps.
        before, after: inside the mixer, what its kernel's backward pass still needs, and what is gone by then.
        mixed: the mixer's output. middle: that and the norm after it. mlp: inside the channel mixer.
        workspace: of the kernel's backward pass.
    """

    entry: float
    projected: float
    inputs: float
    before: float
    after: float
    mixed: float
    middle: float
    mlp: float
    workspace: float

    @property
    def whole(self) -> float:
        """Without recompute."""
        return self.entry + self.projected + self.before + self.after + self.middle + self.mlp


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a rank.

    Attributes:
        held: by kind of layer, first ones among the others, what forward passes left, in the micro-batches under way.
        rest: embeddings, borders of stages and the moment's own.
    """

    held: dict[Layer, float]
    rest: float

    @property
    def total(self) -> float:
        return sum(self.held.values()) + self.rest


class Activations:
    """Live tensors of the ranks of a configuration."""

    def __init__(self, deployment: Deployment, offload: float = 0.0) -> None:
        """offload: share of what forward passes leave that is not on the device; 0 as long as nothing offloads."""
        self.deployment, self.config, self.offload = deployment, deployment.config, offload
        self.model, self.b = deployment.config.model, deployment.itemsize
        self.slots, self.tensor = deployment.slots, deployment.mesh.tensor

    def norm(self, width: float, groups: float = 1) -> float:
        """Bytes a token that a norm with weights keeps beside its input."""
        if self.deployment.gpu:
            return self.b * width + 4 * groups
        return (8 if self.b == 4 else 8 + self.b) * width + 4 * groups

    @property
    def _residual(self) -> float:
        """Bytes a token of a norm's input, where the norm keeps that itself."""
        return self.b * self.model.hidden if self.b == 4 or self.deployment.gpu else 0.0

    @cached_property
    def layers(self) -> dict[Layer, LayerMemory]:
        """Bytes of one layer and micro-batch, by kind of layer."""
        return {kind: self._layer(kind) for kind in dict.fromkeys(self.deployment.layers)}

    def _layer(self, kind: Layer) -> LayerMemory:
        slots, part = self.slots, self.slots / self.tensor  # of the whole rank, and of the residual stream
        norm = part * self.norm(self.model.hidden)
        card, channel_card = self.deployment.cards[kind.mixer], self.deployment.channels[kind.channels]
        projected = slots * self.b * card.in_width / self.tensor
        before, after, stays = card.kept(self.deployment.place(kind))
        residual = part * self._residual
        entry, outs = norm, 0.0
        for each in card.low_ranks():
            entry += part * self.b * each.rank
            outs += slots * self.b * each.width / self.tensor
        mixed = slots * self.b * card.out_width / self.tensor
        return LayerMemory(
            entry=entry,
            # In fp32, what comes out of low ranks is what the backward pass of decays and gates needs.
            projected=(projected if stays == "kernel" else 0.0) + (outs if self.b == 4 else 0.0),
            inputs=projected + outs,
            before=slots * before + (linear_saved(self.deployment, kind) if card.has_state else 0.0),
            after=slots * after + (projected if stays == "gate" else 0.0),
            mixed=mixed,
            middle=mixed + residual + (0.0 if channel_card.is_empty else norm),
            mlp=0.0 if channel_card.is_empty else slots * channel_card.kept(self.deployment.place()) + residual,
            workspace=workspace(self.deployment, kind),
        )

    # ---- the rank's peak

    def kept(self, kind: Layer) -> float:
        """Bytes of a layer between its passes."""
        layer, recompute = self.layers[kind], self.config.train.recompute
        part = self.slots / self.tensor
        if recompute == "full":
            return part * self.b * self.model.hidden
        if recompute == "selective":
            return (layer.entry + layer.inputs + layer.middle + layer.mlp) * (1 - self.offload)
        return layer.whole * (1 - self.offload)

    def peak(self, stage: int) -> Peak:
        """The moment that takes most, in the first backward pass after the most forward passes."""
        deployment, counts = self.deployment, in_flight(self.deployment, stage)
        last = [chunk for chunk, under_way in enumerate(counts) if under_way][-1]
        held: dict[Layer, float] = {}
        rest = 0.0
        for chunk, under_way in enumerate(counts):
            for kind in deployment.kinds(stage, chunk):
                told = kind._replace(is_first=False)
                held[told] = held.get(told, 0.0) + under_way * self.kept(kind)
            # Of each chunk's micro-batches the input, which its first layer's norm keeps, or the pipeline.
            if self.config.train.recompute != "full" and (self._residual or not deployment.is_first(stage, chunk)):
                rest += under_way * self._hidden
            rest += under_way * self._tables(deployment.kinds(stage, chunk))
        rest += self._gathered
        moments, done = [self._output()] if deployment.is_last(stage, last) else [0.0], 0.0
        is_tied = self.model.tied and deployment.is_first(stage) and deployment.is_last(stage, last)
        waits = self._vocabulary if is_tied else 0.0  # the output layer's gradient, for that of the embedding
        for kind in reversed(deployment.kinds(stage, last)):
            if not deployment.channels[kind.channels].is_empty:
                moments.append(waits + self._channels(kind) - done)
            moments.append(waits + self._mixer(kind) - done)
            done += self.kept(kind)
        return Peak(held, rest + max(moments))

    @property
    def _hidden(self) -> float:
        """Bytes of the residual stream."""
        return self.slots / self.tensor * self.b * self.model.hidden

    def _tables(self, layers: Iterable[Layer]) -> float:
        """Cosines and sines of positions, which a micro-batch's layers share."""
        tables: dict[Hashable, int] = {}
        for layer in layers:
            card = self.deployment.cards[layer.mixer]  # which takes `is_first` if its first layer is not as the others
            tables |= card.tables(self.tensor, is_first=True) if layer.is_first else card.tables(self.tensor)
        return 4.0 * self.slots * sum(tables.values())

    @property
    def _gathered(self) -> float:
        """Megatron's buffer for what tensor ranks gather."""
        return self.slots * self.b * self.model.hidden if self.tensor > 1 else 0.0

    @property
    def _vocabulary(self) -> float:
        """Bytes of the output layer's weights."""
        return self.b * self.model.padded_vocab / self.tensor * self.model.hidden

    @property
    def _recomputed(self) -> float:
        """A recomputed layer's or mixer's: its input's gradient or the residual stream's, its output and that one's gradient."""
        return self._hidden * (3 if self.config.train.recompute == "full" else 1)

    def _channels(self, kind: Layer) -> float:
        """Gradients inside the channel mixer."""
        own = self.slots * self.deployment.channels[kind.channels].workspace(self.deployment.place()) + self._recomputed
        if self.config.train.recompute == "full":
            return self.layers[kind].whole + own + (0.0 if self._residual else self._hidden)
        return own - self.slots / self.tensor * self._residual

    def _mixer(self, kind: Layer) -> float:
        """The kernel's workspace, when what came after it is gone."""
        layer, recompute = self.layers[kind], self.config.train.recompute
        gone = layer.middle + layer.mlp
        if recompute == "selective":  # also the mixer's output, made again, and its gradient
            return layer.before - gone + layer.workspace + self._recomputed + 2 * layer.mixed
        whole = layer.whole if recompute == "full" else 0.0
        return whole - gone - layer.after + layer.workspace + self._recomputed

    def _output(self) -> float:
        """Last norm, and what the final loss holds."""
        part, vocab = self.slots / self.tensor, self.model.padded_vocab / self.tensor
        loss = final(self.config).workspace(self.slots, self.model.hidden, vocab, self.b, self.config.train.z_loss)
        return part * self.norm(self.model.hidden) + loss
