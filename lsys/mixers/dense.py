"""The card of the dense MLP."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pydantic import Field, PositiveInt

from lsys.mixers.card import PRODUCT, VECTOR, Place, Weight
from lsys.mixers.channel import ChannelCard
from lsys.section import Section


class Activation(NamedTuple):
    """What lies between the two projections.

    Attributes:
        gated: whether the first projection has two halves, of which one gates the other.
        kept: channels of the width, a token, that autograd keeps where each operation is one of PyTorch's: of the first projection's
            output, in between, and the second's input.
        fused: the same where one kernel does all (Megatron's, on GPUs); None: there is none.
        workspace: channels of the width that are alive at the peak of its backward pass.
        scalars: parameters of its own, one element each.
    """

    gated: bool
    kept: int
    workspace: int
    fused: int | None = None
    scalars: Sequence[str] = ()


ACTIVATIONS = {
    "swiglu": Activation(gated=True, kept=5, workspace=2, fused=3),
    "geglu": Activation(gated=True, kept=5, workspace=2),
    "sglu": Activation(gated=True, kept=4, workspace=2),
    "relu2": Activation(gated=False, kept=2, workspace=3),
    "starrelu": Activation(gated=False, kept=3, workspace=2, scalars=("scale", "shift")),
}


class DenseOptions(Section):
    """Own keys of the dense MLP."""

    activation: Literal["swiglu", "geglu", "sglu", "relu2", "starrelu"] = Field(
        "swiglu",
        description="`swiglu`: SiLU(g) u, `geglu`: GELU(g) u, `sglu`: g u, of the two halves g, u of the first projection; "
        "`relu2`: ReLU(x)^2; `starrelu`: s ReLU(x)^2 + b with learnt s, b.",
    )
    width: PositiveInt | None = Field(None, description="Inner width; `model.ffn` if empty.")


class Dense(ChannelCard):
    name, letter, title = "dense", "F", "dense MLP"
    Options, model_keys = DenseOptions, ("ffn",)
    module = "lsys.model.mixers.dense:DenseMLP"
    own: DenseOptions

    @property
    def row(self) -> str:
        return "mlp" if self.key == self.name else f"{self.key} mlp"

    @property
    def width(self) -> int:
        """Channels between its two projections, over all tensor ranks."""
        return self.own.width or self.model.ffn_width

    @property
    def activation(self) -> Activation:
        return ACTIVATIONS[self.own.activation]

    def in_widths(self) -> Sequence[int]:
        return ((2 if self.activation.gated else 1) * self.width,)

    def weights(self) -> Iterator[Weight]:
        hidden = self.model.hidden
        (rows,) = self.in_widths()
        yield Weight("linear_fc1", rows * hidden, PRODUCT)
        for scalar in self.activation.scalars:
            yield Weight(f"activation_func.{scalar}", 1, VECTOR, is_cut=False, is_summed=True)
        yield Weight("linear_fc2", self.width * hidden, PRODUCT)

    def sliced(self) -> Iterator[tuple[str, str, int]]:
        key = "ffn" if self.own.width is None else self.option("width")
        yield key, "channels of the MLP", self.width

    def kept(self, place: Place) -> float:
        fused = self.activation.fused if place.gpu else None
        return place.itemsize * (self.width / place.tensor) * (self.activation.kept if fused is None else fused)

    def workspace(self, place: Place) -> float:
        return place.itemsize * (self.width / place.tensor) * self.activation.workspace
