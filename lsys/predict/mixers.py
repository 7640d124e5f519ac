"""Bytes a token that token mixers keep between their projections, operation by operation as `lsys.model` has them.

b is the bytes of a number of the model; what autograd keeps in fp32 beside it is counted where it is made.
"""

from __future__ import annotations

from typing import NamedTuple

from lsys.predict.shape import Shape
from lsys.predict.weights import convolved


class Inside(NamedTuple):
    """Bytes a token of one layer.

    Attributes:
        before: what the kernel's backward pass still needs. after: what is gone by then.
        keeps: whether the projections' output is kept, of which something is a view.
    """

    before: float
    after: float
    keeps: bool


def inside(shape: Shape, kind: str) -> Inside:
    """Of the mixer of a letter."""
    if kind in "SW":
        return _softmax(shape, kind)
    state = _State(shape, kind)
    return {"L": state.lightning, "R": state.retention, "G": state.gated, "M": state.mamba, "D": state.delta}[kind]()


def is_sent(shape: Shape, kind: str) -> bool:
    """Whether kernels take heads of all tokens that other ranks sent."""
    return shape.mesh.context > 1 and shape.methods[kind] == "ulysses"


def _softmax(shape: Shape, kind: str) -> Inside:
    model, b, t = shape.config.model, shape.itemsize, shape.mesh.tensor
    q, k = model.heads * model.head_width / t, model.kv_heads * model.head_width / t
    turned = b * (q + k)
    normed = 0.0
    if model.qk_norm:
        copies = b * q if b == 4 or shape.gpu else 0  # of the queries, which were a view
        fp32 = 4 if b == 4 else 8
        normed = copies + (0 if shape.gpu else fp32 * (q + k)) + 4 * (model.heads + model.kv_heads) / t
    attended = b * q + 4 * model.heads / t  # output and log-sum-exp
    received = b * k if is_sent(shape, kind) else 0.0  # values, which are a view otherwise
    return Inside(turned + normed + attended + received, 0.0, True)


class _State:
    """Mixers that keep a state. Of a tensor rank, keys and values are the channels of all its heads."""

    def __init__(self, shape: Shape, kind: str) -> None:
        model, self.b, t = shape.config.model, shape.itemsize, shape.mesh.tensor
        self.model, self.gpu, self.sent = model, shape.gpu, is_sent(shape, kind)
        self.heads, self.key_heads = model.linear_heads / t, model.linear_key_heads / t
        self.keys, self.values = self.key_heads * model.linear_key_width, self.heads * model.linear_head_width
        self.copied = model.linear_heads != model.linear_key_heads  # groups of heads are views where each has its key
        self.clone = self.b * self.values if self.copied else 0.0
        self.channels = convolved(shape.config, kind) / t if kind in "MD" else 0.0

    @property
    def _normed(self) -> float:
        """The output's norm has its weights apart: its input, normalised, then weighted."""
        fp32 = 4 * self.values if self.b == 2 and not self.gpu else 0.0
        return self._o + self.b * self.values * 2 + 4 * self.heads + fp32

    @property
    def _o(self) -> float:
        """The kernel's output, where the norm keeps that itself."""
        return self.b * self.values if self.b == 4 or self.gpu else 0.0

    def _taken(self, numbers: float) -> float:
        """By the kernel, and kept by nothing else: so many were views, but what was sent to this rank is no view."""
        return self.b * numbers if self.sent else self.clone

    def lightning(self) -> Inside:
        normed = self._normed - (self.b * self.values if self.model.linear.norm == "srms" else 0.0)
        turned = 4 * self.b * self.keys if self.model.linear.lrpe == "all" else 0.0
        before = self.b * (2 * self.keys + self.values) + self._taken(0.0) + turned
        return Inside(before, normed + self.b * self.values, True)

    def retention(self) -> Inside:
        normed = 2 * self.b * (self.values + self.heads)  # layer_norm keeps its input
        before = 2 * self.b * self.keys + self._taken(self.values)
        return Inside(before, normed + self.b * self.values + self.clone, not self.copied)

    def gated(self) -> Inside:
        log_decay = 4 * (self.heads * self.model.linear_key_width if self.copied else self.keys)
        makes = (0 if self.gpu else 4 * self.keys) + (4 * self.keys if self.b == 2 else 0)  # logsigmoid's; fp32 copies
        before = log_decay + makes + self._taken(2 * self.keys + self.values)
        return Inside(before, self._normed + self.b * self.values + self.clone, True)

    def mamba(self) -> Inside:
        taken = self._taken(2 * self.keys) if self.sent else 0.0
        before = self._convolution + self.clone + 12 * self.heads + self.b * (self.channels + self.values) + taken
        normed = self._normed - self._o - self.b * self.values  # the norm is of what is gated
        return Inside(before, self.b * self.values * (3 if self.b == 4 else 2) + normed, True)

    def delta(self) -> Inside:
        # The convolution's output: of it fp32 queries and keys, and values, are views.
        convolved = self._convolution + (self.b * self.channels if self.b == 4 or not self.copied else 0)
        unit = 2 * ((4 if self.b == 2 else 0) * self.keys + self.b * self.keys + 4 * self.key_heads)
        before = convolved + unit + 16 * self.heads + self._taken(self.values)
        return Inside(before, self._normed + self.b * self.values + self.clone, not self.copied)

    @property
    def _convolution(self) -> float:
        """Its input, cut out of the projections; its fp32 sum."""
        return (self.b + 4) * self.channels
