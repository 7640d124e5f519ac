"""Live tensors of a forward and backward pass, at their peak, on one rank.

What autograd keeps of a layer is counted operation by operation, in bytes a token slot; what is alive only for a moment is counted at
the moments at which a peak can be, all in the first backward pass after the most forward passes: behind the output layer, in the MLP,
in the mixer's kernel. b is the bytes of a number of the model; sums, norms and states are fp32.

    norm of w channels, CPU      b = 4: normalised w, output w            b = 2: fp32 copy 4 w, normalised 4 w, output 2 w
    norm, GPU (fused)            output b w; its input is kept
    MLP of F channels, CPU       2 F in, SiLU F, up + offset F, product F; GPU (fused SwiGLU): 2 F in, product F

Recomputed layers keep their input alone, recomputed mixers their projections and output. The counts are those of torch operations on
a CPU, measured (tests/predict/test_memory.py); those of fused operations on GPUs are read from their sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lsys.predict.kernels import attention_workspace, linear_saved, linear_workspace
from lsys.predict.schedule import in_flight
from lsys.predict.shape import Shape
from lsys.predict.weights import convolved, in_width, out_width


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer and micro-batch that live until its backward pass.

    Attributes:
        entry: the norm before the mixer, and the projections' output where mixers keep it.
        before, after: inside the mixer, what its kernel's backward pass still needs, and what is gone by then.
        middle: the mixer's output and the norm after it. mlp: inside the MLP.
        workspace: of the kernel's backward pass.
        projected: the projections' output, which a recomputed mixer keeps as its input.
    """

    entry: float
    before: float
    after: float
    middle: float
    mlp: float
    workspace: float
    projected: float

    @property
    def whole(self) -> float:
        """Without recompute."""
        return self.entry + self.before + self.after + self.middle + self.mlp


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a rank.

    Attributes:
        held: by kind of layer, what forward passes left, in the micro-batches under way.
        rest: embeddings, borders of stages and the moment's own.
    """

    held: dict[str, float]
    rest: float

    @property
    def total(self) -> float:
        return sum(self.held.values()) + self.rest


class Activations:
    """Of the ranks of a configuration; context: which of the context ranks, whose tokens may differ."""

    def __init__(self, shape: Shape, offload: float = 0.0) -> None:
        """offload: share of what forward passes leave that is not on the device; 0 as long as nothing offloads."""
        self.shape, self.config, self.offload = shape, shape.config, offload
        self.model, self.b = shape.config.model, shape.itemsize
        self.slots, self.tensor = shape.slots, shape.mesh.tensor

    def norm(self, width: float, groups: float = 1) -> float:
        """Bytes a token that a norm with weights keeps beside its input."""
        if self.shape.gpu:
            return self.b * width + 4 * groups
        return (8 if self.b == 4 else 8 + self.b) * width + 4 * groups

    @property
    def _residual(self) -> float:
        """Bytes a token of a norm's input, where the norm keeps that itself."""
        return self.b * self.model.hidden if self.b == 4 or self.shape.gpu else 0.0

    @cached_property
    def layers(self) -> dict[str, LayerMemory]:
        """By letter."""
        return {kind: self._layer(kind) for kind in dict.fromkeys(self.model.kinds)}

    def _layer(self, kind: str) -> LayerMemory:
        slots, part = self.slots, self.slots / self.tensor  # of the whole rank, and of the residual stream
        norm = part * self.norm(self.model.hidden)
        ffn = self.model.ffn_width / self.tensor
        projected = slots * self.b * in_width(self.config, kind) / self.tensor
        before, after, keeps = self._softmax() if kind in "SW" else self._linear(kind)
        entry = norm + part * (self.b * self.model.linear.gate_rank if kind == "G" else 0)
        mixed = slots * self.b * out_width(self.config, kind) / self.tensor
        workspace = attention_workspace(self.shape, kind) if kind in "SW" else linear_workspace(self.shape, kind)
        return LayerMemory(
            entry=entry + (projected if keeps else 0.0),
            before=slots * before + (0.0 if kind in "SW" else linear_saved(self.shape, kind)),
            after=slots * after,
            middle=mixed + part * self._residual + norm,
            mlp=slots * self.b * ffn * (3 if self.shape.gpu else 5) + part * self._residual,
            workspace=workspace,
            projected=projected,
        )

    def _softmax(self) -> tuple[float, float, bool]:
        """Bytes a token before and after the kernel, and whether the projections' output is kept."""
        model, b, t = self.model, self.b, self.tensor
        q, k = model.heads * model.head_width / t, model.kv_heads * model.head_width / t
        turned = b * (q + k)
        normed = 0.0
        if model.qk_norm:
            copies = b * q if b == 4 or self.shape.gpu else 0  # of the queries, which were a view
            fp32 = 4 if b == 4 else 8
            normed = copies + (0 if self.shape.gpu else fp32 * (q + k)) + 4 * (model.heads + model.kv_heads) / t
        attended = b * q + 4 * model.heads / t  # output and log-sum-exp
        return turned + normed + attended, 0.0, True

    def _linear(self, kind: str) -> tuple[float, float, bool]:
        model, b, t = self.model, self.b, self.tensor
        heads, key_heads = model.linear_heads / t, model.linear_key_heads / t
        keys, values = key_heads * model.linear_key_width, heads * model.linear_head_width
        copied = model.linear_heads != model.linear_key_heads  # groups of heads are views only where each has its key
        clone = b * values if copied else 0.0
        o = b * values if b == 4 or self.shape.gpu else 0.0  # what the output's norm keeps
        # The output's norm has its weights apart: normalised, then weighted.
        norm = o + b * values * (2 if kind != "M" else 1) + 4 * heads
        if b == 2 and not self.shape.gpu:
            norm += 4 * values
        if kind == "L":
            if model.linear.norm == "srms":
                norm -= b * values
            turned = 4 * b * keys if model.linear.lrpe == "all" else 0.0
            before = b * (2 * keys + values) + clone + turned
            return before, norm + b * values, True
        if kind == "R":
            norm = b * values * 2 + 2 * b * heads  # layer_norm keeps its input
            return 2 * b * keys + clone, norm + b * values + clone, not copied
        if kind == "G":
            gates = 8 * keys + 4 * (heads * model.linear_key_width if copied else keys)
            return gates + clone, norm + b * values + clone, True
        channels = convolved(self.config, kind) / t
        conv = b * channels + 4 * channels  # its input, cut out of the projections; its fp32 sum
        if kind == "M":
            before = conv + clone + 12 * heads + b * (channels + values)
            return before, b * values * 2 + (b * values if b == 4 else 0) + norm - o, True
        conv += (
            b * channels if b == 4 or not copied else 0
        )  # its output: fp32 queries and keys, and values, are views of it
        unit = 2 * ((4 if b == 2 else 0) * keys + b * keys + 4 * key_heads)
        return conv + unit + 16 * heads + clone, norm + b * values + clone, not copied

    # ---- the rank's peak

    def kept(self, kind: str) -> float:
        """Bytes of a layer between its passes."""
        layer, recompute = self.layers[kind], self.config.train.recompute
        part = self.slots / self.tensor
        if recompute == "full":
            return part * self.b * self.model.hidden
        if recompute == "selective":
            norm = part * self.norm(self.model.hidden)
            return (norm + layer.projected + layer.middle + layer.mlp) * (1 - self.offload)
        return layer.whole * (1 - self.offload)

    def peak(self, stage: int) -> Peak:
        """The moment that takes most, in the first backward pass after the most forward passes."""
        shape, counts = self.shape, in_flight(self.shape, stage)
        last = [chunk for chunk, under_way in enumerate(counts) if under_way][-1]
        held: dict[str, float] = {}
        rest = 0.0
        for chunk, under_way in enumerate(counts):
            for kind in shape.kinds(stage, chunk):
                held[kind] = held.get(kind, 0.0) + under_way * self.kept(kind)
            # Of each chunk's micro-batches the input, which its first layer's norm keeps, or the pipeline.
            if self.config.train.recompute != "full" and (self._residual or not shape.is_first(stage, chunk)):
                rest += under_way * self._hidden
            rest += under_way * self._tables(shape.kinds(stage, chunk))
        moments, done = [self._output()] if shape.is_last(stage, last) else [0.0], 0.0
        for kind in reversed(shape.kinds(stage, last)):
            moments += [self._mlp(kind) - done, self._mixer(kind) - done]
            done += self.kept(kind)
        return Peak(held, rest + max(moments))

    @property
    def _hidden(self) -> float:
        """Of the residual stream."""
        return self.slots / self.tensor * self.b * self.model.hidden

    def _tables(self, kinds: str) -> float:
        """Cosines and sines of positions, which a micro-batch's layers share."""
        model, widths = self.model, set[int]()
        if {*"SW"} & {*kinds}:
            widths.add(model.head_width)
        if "R" in kinds:
            widths.add(model.linear_key_width)
        return 4.0 * self.slots * sum(widths)

    def _mlp(self, kind: str) -> float:
        """The gradient of the product of SwiGLU's halves, and theirs."""
        gathered = self.slots * self.b * self.model.hidden if self.tensor > 1 else 0.0
        own = 2 * self.slots * self.b * self.model.ffn_width / self.tensor + gathered + self._hidden
        if self.config.train.recompute == "full":
            return self.layers[kind].whole + own + (0.0 if self._residual else self._hidden)
        return own - self.slots / self.tensor * self._residual

    def _mixer(self, kind: str) -> float:
        """The kernel's workspace, when what came after it is gone."""
        layer, recompute = self.layers[kind], self.config.train.recompute
        gone = layer.middle + layer.mlp
        if recompute == "selective":
            return layer.before - gone + layer.workspace + self._hidden
        whole = layer.whole if recompute == "full" else 0.0
        return whole - gone - layer.after + layer.workspace + self._hidden

    def _output(self) -> float:
        """Last norm, logits and what the loss makes of them (fp32 copies of bf16 logits; the z-loss's gradient)."""
        part, vocab = self.slots / self.tensor, self.model.padded_vocab / self.tensor
        gathered = self.slots * self.b * self.model.hidden * (2 if self.tensor > 1 else 1)
        logits = self.slots * vocab
        most = 6 * logits if self.b == 2 else (12 if self.config.train.z_loss else 4) * logits
        back = self.b * logits + gathered + self.b * vocab * self.model.hidden
        return part * self.norm(self.model.hidden) + max(most, back)
