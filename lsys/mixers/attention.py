"""The family of softmax attention: what follows for every mask."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import ClassVar

from lsys.kernels.mask import CAUSAL, Mask
from lsys.mixers.card import NORM, Card, Kept, Place, Refusal, Weight
from lsys.mixers.exchange import Exchange, KeyValues


class AttentionCard(Card):
    """Softmax attention with grouped keys, QK-norm and rotary positions; `mask` says what a query sees."""

    has_state = False
    model_keys: ClassVar[Sequence[str]] = ("groups", "qk_norm", "rope_base")

    @property
    def mask(self) -> Mask:
        """What a query sees of its own document."""
        return CAUSAL

    @property
    def groups(self) -> int:
        return self.model.kv_heads

    def parts(self) -> Mapping[str, int]:
        width = self.model.head_width
        return {"q": self.model.heads // self.model.kv_heads * width, "k": width, "v": width}

    @property
    def out_width(self) -> int:
        return self.model.heads * self.model.head_width

    def small(self) -> Iterator[Weight]:
        if self.model.qk_norm:
            for name in ("q_layernorm", "k_layernorm"):
                yield Weight(name, self.model.head_width, NORM, is_cut=False, is_summed=True)

    def refusals(self) -> Iterator[Refusal]:
        model = self.model
        known = model.head_dim is not None or model.hidden % model.heads == 0
        if known and model.head_width % 2:
            fix = f"{model.head_width - 1 or 2} or {model.head_width + 1} does"
            yield Refusal("head_dim", f"{model.head_width} is odd, and rotary positions turn pairs of channels", fix)
        if not self.mask.is_own:  # a layer's positions, FLOPs and decoding are of documents that see themselves alone
            problem = f"layers of {self.key} let documents see others, by {self.mask.documents}"
            yield Refusal(
                "pattern", problem, "a layer's mask has documents=Own(); others are for `softmax_attention` itself"
            )

    def mixing_flops(self, lengths: Sequence[int], is_first: bool = False) -> float:
        return 4.0 * self.out_width * sum(self.mask.visible(0, length, length) for length in lengths)

    def kept(self, place: Place) -> Kept:
        model, b, t = self.model, place.itemsize, place.tensor
        q, k = self.out_width / t, model.kv_heads * model.head_width / t
        rotated = b * (q + k)
        normed = 0.0
        if model.qk_norm:
            copies = b * q if b == 4 or place.gpu else 0  # of the queries, which were a view
            fp32 = 4 if b == 4 else 8
            normed = copies + (0 if place.gpu else fp32 * (q + k)) + 4 * (model.heads + model.kv_heads) / t
        attended = b * q + 4 * model.heads / t  # output and log-sum-exp
        received = b * k if place.is_sent else 0.0  # values, which are a view otherwise
        return Kept(rotated + normed + attended + received, 0.0, "kernel")

    def tables(self, tensor: int, is_first: bool = False) -> Mapping[Hashable, int]:
        return {("rotary", self.model.head_width): self.model.head_width}

    def exchanges(self, tensor: int, is_first: bool = False) -> Sequence[Exchange]:
        model = self.model
        return [KeyValues(model.heads // tensor, model.kv_heads // tensor, model.head_width, self.mask)]
