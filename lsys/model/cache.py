"""What layers keep of a document's tokens so far, so that it goes on one token at a time (recurrent decoding)."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Cache:
    """By number of the layer, the tensors that its mixer keeps: a state of constant size, or keys and values of all tokens."""

    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def layer(self, number: int) -> dict[str, Tensor]:
        """The tensors of a layer, to be read and replaced; empty at the start of a document."""
        return self.layers.setdefault(number, {})

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for layer in self.layers.values() for x in layer.values())
