"""Parameters and floating-point operations of a model, counted from its configuration. Needs nothing but the schema.

A product of [m, k] and [k, n] is 2 m n k FLOPs. Norms, activations, gates, rotary positions and exponentials are left
out, as is usual.
"""

from collections.abc import Sequence

from lsys.config.model import Model
from lsys.mixers.card import NORM, VECTOR, Card
from lsys.mixers.channel import ChannelCard
from lsys.mixers.state import CHUNK

__all__ = ["CHUNK", "flops_per_token", "parameters", "recompute_flops_per_token", "training_flops"]


def parameters(model: Model) -> dict[str, int]:
    """Exact number of parameters of each part, over all layers: weights of norms and the padding of the vocabulary too.

    Mixers are named as the model's layers have them, the dense MLP `mlp`. A tied output layer is the embedding, so it counts 0.

    Raises:
        KeyError: a layer is of a kind that nothing knows.
    """
    counted, channels = _counted(model), _counted_channels(model)
    head_norms = sum(count * card.numel(NORM) for card, count in (*counted, *channels))
    layer_norms = model.layers + sum(count for card, count in channels)
    embedding = model.padded_vocab * model.hidden
    return {
        "embedding": embedding,
        **{f"{card.key} mixer": count * (card.products + card.numel(VECTOR)) for card, count in counted},
        **{card.row: count * (card.products + card.numel(VECTOR)) for card, count in channels},
        "norms": (layer_norms + 1) * model.hidden + head_norms,
        "output": 0 if model.tied else embedding,
    }


def _counted(model: Model) -> list[tuple[Card, int]]:
    """The kinds of layers that the model has, and how many of each."""
    return [(card, model.kinds.count(kind)) for kind, card in model.cards.items()]


def _counted_channels(model: Model) -> list[tuple[ChannelCard, int]]:
    """The channel mixers that the model has, and in how many layers each."""
    cards = model.channel_cards.items()
    return [(card, model.channel_kinds.count(kind)) for kind, card in cards if not card.is_empty]


def flops_per_token(model: Model, lengths: int | Sequence[int]) -> dict[str, float]:
    """Forward FLOPs per token of each kind of layer, over all layers of that kind.

    Softmax attention of a token sees the s tokens up to itself in its document: 2 H D s for the scores and as
    many for the values. Over a document of n tokens the mean of s is (n + 1) / 2; a window of w tokens caps each s
    at w. Layers with a state do not depend on the lengths (`lsys.mixers.state`). Short convolutions of W tokens do 2 W a channel.

    Args:
        lengths: tokens of each document of a pack, or of one document; 0 is allowed.

    Raises:
        ValueError: there is no token.
    """
    lengths = [lengths] if isinstance(lengths, int) else lengths
    tokens = sum(lengths)
    if tokens < 1:
        raise ValueError(f"document lengths {list(lengths)[:8]} hold no token; FLOPs per token need at least one")
    parts: dict[str, float] = {}
    for mixer, count in _counted(model):
        apart = 1 if mixer.is_first_apart else 0
        mixing = (count - apart) * mixer.mixing_flops(lengths) + apart * mixer.mixing_flops(lengths, is_first=True)
        parts[f"{mixer.key} projections"] = 2.0 * count * mixer.products
        parts[f"{mixer.key} attention"] = mixing / tokens
    for card, count in _counted_channels(model):
        parts[card.row] = 2.0 * count * card.products
    parts["output"] = 2.0 * model.padded_vocab * model.hidden
    return parts


def training_flops(model: Model, lengths: int | Sequence[int]) -> float:
    """Model FLOPs of a forward and backward pass over these documents: three forward passes. MFU is made of these."""
    tokens = lengths if isinstance(lengths, int) else sum(lengths)
    return 3.0 * tokens * sum(flops_per_token(model, lengths).values()) if tokens else 0.0


def recompute_flops_per_token(model: Model, lengths: int | Sequence[int], recompute: str) -> float:
    """What `train.recompute` adds in backward, per token: hardware FLOPs are model FLOPs plus these.

    `selective` repeats what lies between the mixers' projections, `full` all layers but not the output layer.
    """
    forward = flops_per_token(model, lengths)
    repeated = {
        "none": (),
        "selective": tuple(part for part in forward if part.endswith("attention")),
        "full": tuple(part for part in forward if part != "output"),
    }
    if recompute not in repeated:
        raise ValueError(f"recompute {recompute!r} is unknown; there are {', '.join(repeated)}")
    return sum(forward[part] for part in repeated[recompute])
