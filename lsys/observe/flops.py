"""Parameters and floating-point operations of a model, counted from its configuration. Needs nothing but the schema.

A product of [m, k] and [k, n] is 2 m n k FLOPs. Norms, activations, gates, rotary positions and exponentials are left
out, as is usual.
"""

from collections.abc import Sequence

from lsys.config.schema import STATE_MIXERS, Model

CHUNK = 64  # tokens of one chunk of linear attention
NAMES = {
    "S": "softmax",
    "W": "window",
    "L": "linear",
    "R": "retention",
    "G": "gated linear",
    "M": "Mamba-2",
    "D": "delta",
}


def parameters(model: Model) -> dict[str, int]:
    """Exact number of parameters of each part, over all layers: weights of norms and the padding of the vocabulary too.

    Mixers are named for the kinds of layers that the model has. A tied output layer is the embedding, so it counts 0.
    """
    counts = _counts(model)
    head_norms = sum(count * _head_norms(model, kind) for kind, count in counts.items())
    embedding = model.padded_vocab * model.hidden
    return {
        "embedding": embedding,
        **{
            f"{NAMES[kind]} mixer": count * (_projections(model, kind) + _vectors(model, kind))
            for kind, count in counts.items()
        },
        "mlp": model.layers * 3 * model.ffn_width * model.hidden,
        "norms": (2 * model.layers + 1) * model.hidden + head_norms,
        "output": 0 if model.tied else embedding,
    }


def _counts(model: Model) -> dict[str, int]:
    """Layers of each kind that the model has."""
    return {kind: model.kinds.count(kind) for kind in NAMES if kind in model.kinds}


def _projections(model: Model, kind: str) -> int:
    """Weights of a mixer's projections: softmax has queries, keys, values and output; those with a state have a gate besides, and
    what makes their decay (`G`: a low rank; `M`: a step a head; `D`: that and beta).
    """
    if kind in "SW":
        return 2 * (model.heads + model.kv_heads) * model.head_width * model.hidden
    keys, values = _widths(model)
    weights = (2 * keys + 3 * values) * model.hidden
    if kind == "G":
        weights += model.linear.gate_rank * (model.hidden + keys)
    return weights + {"M": 1, "D": 2}.get(kind, 0) * model.linear_heads * model.hidden


def _widths(model: Model) -> tuple[int, int]:
    """Channels of all heads' keys, of all heads' values."""
    return model.linear_key_heads * model.linear_key_width, model.linear_heads * model.linear_head_width


def _convolved(model: Model, kind: str) -> int:
    """Channels that a short convolution goes over: all but gates and steps."""
    keys, values = _widths(model)
    return 2 * keys + values if kind in "MD" else 0


def _vectors(model: Model, kind: str) -> int:
    """Parameters beside projections and norms: convolutions; `G`: a bias of the decay; `M`: biases of the convolution, D; both of
    `M` and `D`: rate and step of every head.
    """
    channels, heads = _convolved(model, kind), model.linear_heads
    own = {"G": _widths(model)[0], "M": channels + 3 * heads, "D": 2 * heads}
    return channels * model.linear.conv_width + own.get(kind, 0)


def _head_norms(model: Model, kind: str) -> int:
    """Weights of norms inside a mixer."""
    if kind in "SW":
        return 2 * model.head_width if model.qk_norm else 0
    return 0 if kind == "R" or kind == "L" and model.linear.norm == "srms" else _widths(model)[1]


def flops_per_token(model: Model, lengths: int | Sequence[int]) -> dict[str, float]:
    """Forward FLOPs per token of each kind of layer, over all layers of that kind.

    Softmax attention of a token sees the s tokens up to itself in its document: 2 H D s for the scores and as
    many for the values. Over a document of n tokens the mean of s is (n + 1) / 2; a window of w tokens caps each s
    at w. Layers with a state do not depend on the lengths. In chunks of C tokens, with keys of width K and values of width V, a head does
    4 K V with the state (read and update) and 2 C (K + V) inside the chunk (two full C x C products, scores and values; scores once
    for all the heads that share keys, but for `G`, whose decay is in them). The delta rule also takes from values what the state says,
    2 K V, and solves for a chunk's corrections: scores of keys, 2 C K, and the solution times keys and values, 2 C (K + V). Short
    convolutions of W tokens do 2 W a channel.

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
    for kind, count in _counts(model).items():
        parts[f"{NAMES[kind]} projections"] = 2.0 * count * _projections(model, kind)
        parts[f"{NAMES[kind]} attention"] = count * _mixing(model, kind, lengths, tokens)
    if "L" in model.kinds:  # phases make queries and keys twice as wide
        turned = {"none": 0, "first": 1, "all": model.kinds.count("L")}[model.linear.lrpe]
        parts["linear attention"] += turned * (_state_flops(model, "L", 2) - _state_flops(model, "L"))
    parts["mlp"] = 2.0 * model.layers * 3 * model.ffn_width * model.hidden
    parts["output"] = 2.0 * model.padded_vocab * model.hidden
    return parts


def _mixing(model: Model, kind: str, lengths: Sequence[int], tokens: int) -> float:
    """FLOPs per token of one layer between its projections."""
    if kind in STATE_MIXERS:
        return 2.0 * _convolved(model, kind) * model.linear.conv_width + _state_flops(model, kind)
    window = model.window if kind == "W" else None
    return 4.0 * model.heads * model.head_width * sum(_visible(n, window) for n in lengths) / tokens


def _state_flops(model: Model, kind: str, wider: int = 1) -> float:
    """FLOPs per token of one layer's state, with keys `wider` times as wide as configured."""
    heads, k, v = model.linear_heads, wider * model.linear_key_width, model.linear_head_width
    scored = heads if kind in "GD" else model.linear_key_heads
    flops = heads * (4 * k * v + 2 * CHUNK * v) + scored * 2 * CHUNK * k
    if kind == "D":
        flops += heads * (2 * k * v + 2 * CHUNK * (2 * k + v))
    return float(flops)


def _visible(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in a causal document."""
    full = length if window is None else min(length, window)  # of these tokens the first sees 1, the last all
    return full * (full + 1) // 2 + (length - full) * full


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
