"""What layers keep of a document's tokens so far, so that it goes on one token at a time (recurrent decoding)."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass
class Cache:
    """What each mixer of each layer keeps: a state of constant size, or keys and values of all tokens.

    Attributes:
        layers: the tensors by name, by number of the layer and "tokens" or "channels".
    """

    layers: dict[tuple[int, str], dict[str, Tensor]] = field(default_factory=dict)

    def layer(self, number: int, mixer: Literal["tokens", "channels"] = "tokens") -> dict[str, Tensor]:
        """The tensors of one mixer of a layer, to be read and replaced; empty at the start of a document."""
        return self.layers.setdefault((number, mixer), {})

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for layer in self.layers.values() for x in layer.values())
