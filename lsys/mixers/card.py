"""What a card says of a mixer: its keys, widths, parameters, exchanges, and what its backward pass keeps.

A layer is a pair: a token mixer (`Card`), which sees the tokens of documents, and a channel mixer (`lsys.mixers.channel`), which is
for each token. A card is a class; an instance is the mixer as one model has it, with its own options. Configuration, rules, FLOPs,
memory, traffic, times and tests ask the instance and never go by a letter or a name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lsys.section import Section

if TYPE_CHECKING:
    from lsys.config.losses import LayerLoss
    from lsys.config.model import Model
    from lsys.mixers.exchange import Exchange

Kind = Literal["norm", "product", "vector"]
NORM: Kind = "norm"
PRODUCT: Kind = "product"
VECTOR: Kind = "vector"


class Weight(NamedTuple):
    """A parameter of a mixer beside the two projections that every mixer has.

    Attributes:
        name: inside the mixer, without a last `.weight`. numel: of the whole.
        kind: NORM: a weight of a norm; PRODUCT: a matrix that every token is multiplied by; VECTOR: anything else.
        is_cut: whether each tensor rank holds a part; else each holds all.
        is_summed: whether tensor ranks, which see some of the tokens each, sum its gradients.
        is_trained: whether it has a gradient.
    """

    name: str
    numel: int
    kind: Kind
    is_cut: bool = True
    is_summed: bool = False
    is_trained: bool = True


class LowRank(NamedTuple):
    """Two products in a row, hidden -> rank -> width, of which every tensor rank holds the first whole."""

    name: str
    rank: int
    width: int
    bias: bool

    def weights(self, hidden: int) -> Iterator[Weight]:
        """The parameters `NAME_in`, `NAME_out.weight`, `NAME_out.bias`."""
        yield Weight(f"{self.name}_in", self.rank * hidden, PRODUCT, is_cut=False, is_summed=True)
        yield Weight(f"{self.name}_out.weight", self.rank * self.width, PRODUCT)
        if self.bias:
            yield Weight(f"{self.name}_out.bias", self.width, VECTOR)


@dataclass(frozen=True)
class Place:
    """Where a layer runs, as far as its bytes depend on it.

    Attributes:
        itemsize: bytes of an element of the model. gpu: whether norms and the like are fused kernels.
        tensor: degree. is_sent: whether kernels take heads of all tokens, which other ranks sent.
        is_first: whether it is the first layer of its token mixer, where that is not as the others.
    """

    itemsize: int
    gpu: bool
    tensor: int
    is_sent: bool
    is_first: bool = False


class Kept(NamedTuple):
    """Bytes a token that autograd keeps of a mixer between its projections.

    Attributes:
        before: what the kernel's backward pass still needs. after: what is gone by then.
        projections: with which of the two the projections' output stays, of which something is a view: "kernel", "gate" or "none".
    """

    before: float
    after: float
    projections: Literal["kernel", "gate", "none"]


class Refusal(NamedTuple):
    """Why a model cannot have the mixer as it is configured: the key below `model`, value and rule, what would do."""

    key: str
    problem: str
    fix: str


class Layer(NamedTuple):
    """The kind of a layer.

    Attributes:
        mixer, channels: the names of its token mixer and of its channel mixer.
        is_first: as of `Place`; the predictor tells these layers from the others.
    """

    mixer: str
    channels: str
    is_first: bool = False


class MixerCard(ABC):
    """What the cards of token mixers and of channel mixers have in common.

    Args:
        key: its name, or that of a variant of it.
        own: its section, `model.mixers.KEY`.

    Attributes:
        name: as in `model.mixers` and in lists in the pattern of its kind; also of its files. letter: its short form there; "" for none.
        symbol: its letter, or its name where it has none; calibrations know it by this. title: in sentences.
        Options: its section. model_keys: the keys of `model` that are for it and not for all.
        module: where its module is, "package.module:Class".
    """

    name: ClassVar[str]
    letter: ClassVar[str] = ""
    title: ClassVar[str]
    Options: ClassVar[type[Section]] = Section
    model_keys: ClassVar[Sequence[str]] = ()
    module: ClassVar[str]

    symbol: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "name"):
            cls.symbol = cls.letter or cls.name

    def __init__(self, key: str, model: Model, own: Any) -> None:
        self.key, self.model, self.own = key, model, own

    # ---- parameters and rules

    @abstractmethod
    def weights(self) -> Iterator[Weight]:
        """Its parameters in the order in which the module makes them; of a token mixer all but the two projections."""

    def numel(self, *kinds: str) -> int:
        """Elements of the parameters of these kinds among `weights`."""
        return sum(weight.numel for weight in self.weights() if weight.kind in kinds)

    @property
    @abstractmethod
    def products(self) -> int:
        """Elements of all weights that a token is multiplied by."""

    def losses(self) -> Iterator[LayerLoss]:
        """What its layers add to the loss."""
        yield from ()

    def refusals(self) -> Iterator[Refusal]:
        """What is wrong with it."""
        yield from ()

    def sliced(self) -> Iterator[tuple[str, str, int]]:
        """(key below `model`, what it counts, how many) of what tensor ranks share out in equal parts."""
        yield from ()

    def option(self, key: str) -> str:
        """The path below `model` of one of its own keys."""
        return f"mixers.{self.key}.{key}"


class Card(MixerCard):
    """A token mixer in a model.

    Attributes:
        has_state: whether it keeps a state of constant size; else keys and values.
    """

    has_state: ClassVar[bool]

    # ---- widths and parameters

    @property
    @abstractmethod
    def groups(self) -> int:
        """In how many equal groups the input projection is laid out: key heads, each with the heads that it serves."""

    @abstractmethod
    def parts(self) -> Mapping[str, int]:
        """Widths of the parts of one group in the input projection, in their order."""

    @property
    @abstractmethod
    def out_width(self) -> int:
        """Channels that it hands to its output projection, over all tensor ranks."""

    @property
    def in_width(self) -> int:
        """Rows of the input projection, over all tensor ranks."""
        return self.groups * sum(self.parts().values())

    def low_ranks(self) -> Sequence[LowRank]:
        """What it projects in two products beside the input projection."""
        return ()

    def small(self) -> Iterator[Weight]:
        """Parameters beside projections and low ranks, in the order in which the module makes them."""
        yield from ()

    def weights(self) -> Iterator[Weight]:
        """All parameters but the two projections, in the order in which the module makes them."""
        yield from self.small()
        for each in self.low_ranks():
            yield from each.weights(self.model.hidden)

    @property
    def products(self) -> int:
        return self.model.hidden * (self.in_width + self.out_width) + self.numel(PRODUCT)

    # ---- work, memory, traffic

    @property
    def is_first_apart(self) -> bool:
        """Whether the first of its layers in a model is not as the others: whether it exchanges something else."""
        return self.exchanges(1, is_first=True) != self.exchanges(1)

    @abstractmethod
    def mixing_flops(self, lengths: Sequence[int], is_first: bool = False) -> float:
        """FLOPs of a forward pass of one layer between its projections, over documents of these lengths."""

    @abstractmethod
    def kept(self, place: Place) -> Kept:
        """What autograd keeps of one layer on a rank."""

    def tables(self, tensor: int, is_first: bool = False) -> Mapping[Hashable, int]:
        """Widths of the tables of positions that a layer shares with all of a micro-batch, by what makes two the same."""
        return {}

    @abstractmethod
    def exchanges(self, tensor: int, is_first: bool = False) -> Sequence[Exchange]:
        """What one layer of a tensor rank exchanges over the ranks of a sequence, in order."""
