"""The frame of mixers that keep a state: linear attention in all its forms."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.mixers.state import StateCard
from lsys.model.mixers.mixer import Mixer, MixerOptions
from lsys.model.packed import PackedMicroBatch
from lsys.parallel.linear import linear_attention


class LinearMixer(Mixer):
    """Queries and keys of H_k heads, values of H heads, of which each key head serves n = H / H_k.

    `in_proj` is laid out key head by key head, of each the parts that the card names, so a tensor rank owns whole heads. All that a token
    needs of those before it is what `Cache` keeps: the state and, with a short convolution, its last inputs.
    """

    card: StateCard
    own: Any  # its section of the YAML

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        options: MixerOptions,
        **unused: Any,
    ) -> None:
        card = options.card
        assert isinstance(card, StateCard)
        self.card, self.own = card, card.own
        self.heads, self.key_heads = card.heads, card.key_heads
        self.key_dim, self.head_dim = card.key_width, card.value_width
        self.values_per_key = self.heads // self.key_heads
        super().__init__(config, layer_number, pg_collection, options)

    def split_projection(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[T_r, in_width / tensor] -> the parts, each [T_r, key heads, its width]."""
        widths = tuple(self.card.parts().values())
        groups = self.key_heads // self.tp_group.size()
        return projected.view(len(projected), groups, sum(widths)).split(widths, dim=-1)

    def to_value_heads(self, x: Tensor) -> Tensor:
        """[T_r, key heads, n D] -> [T_r, H, D]."""
        return x.reshape(len(x), self.heads // self.tp_group.size(), self.head_dim)

    def local_heads(self, of_heads: Tensor) -> Tensor:
        """The rows of this tensor rank's heads or key heads."""
        return of_heads.chunk(self.tp_group.size())[self.tp_group.rank()].to(self.in_proj.weight.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedMicroBatch, **options: Any) -> Tensor:
        """q, k [T_r, H_k, Dk], v [T_r, H, Dv] -> [T_r, H, Dv]; options of `lsys.parallel.linear.linear_attention`."""
        kept, method = self.layer_cache(packed), self.options.method
        if kept is None:
            return linear_attention(q, k, v, packed.layout, packed.comm, method=method, **options)[0]
        options |= dict(initial_state=kept.get("state"), output_final_state=True)
        o, state = linear_attention(q, k, v, packed.layout, packed.comm, method=method, **options)
        assert state is not None
        kept["state"] = state
        return o
