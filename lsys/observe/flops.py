"""Parameters and floating-point operations of a model, counted from its configuration. Needs nothing but the schema.

A product of [m, k] and [k, n] is 2 m n k FLOPs. Norms, activations, rotary positions and exponentials are left
out, as is usual.
"""

from collections.abc import Sequence

from lsys.config.schema import Model

CHUNK = 64  # tokens of one chunk of linear attention
NAMES = {"S": "softmax", "W": "window", "L": "linear"}


def parameters(model: Model) -> dict[str, int]:
    """Exact number of parameters of each part, over all layers: weights of norms and the padding of the vocabulary too.

    Mixers are named for the kinds of layers that the model has. A tied output layer is the embedding, so it counts 0.
    """
    counts = _counts(model)
    head_norms = (counts.get("S", 0) + counts.get("W", 0)) * (2 * model.head_width if model.qk_norm else 0)
    head_norms += counts.get("L", 0) * model.linear_heads * model.linear_head_width
    embedding = model.padded_vocab * model.hidden
    return {
        "embedding": embedding,
        **{f"{NAMES[kind]} mixer": count * _projections(model, kind) for kind, count in counts.items()},
        "mlp": model.layers * 3 * model.ffn_width * model.hidden,
        "norms": (2 * model.layers + 1) * model.hidden + head_norms,
        "output": 0 if model.tied else embedding,
    }


def _counts(model: Model) -> dict[str, int]:
    """Layers of each kind that the model has."""
    return {kind: model.kinds.count(kind) for kind in NAMES if kind in model.kinds}


def _projections(model: Model, kind: str) -> int:
    """Weights of a mixer's two projections: softmax has queries, keys, values and output; linear has a gate besides."""
    if kind in "SW":
        return 2 * (model.heads + model.kv_heads) * model.head_width * model.hidden
    return 5 * model.linear_heads * model.linear_head_width * model.hidden


def flops_per_token(model: Model, lengths: int | Sequence[int]) -> dict[str, float]:
    """Forward FLOPs per token of each kind of layer, over all layers of that kind.

    Softmax attention of a token sees the s tokens up to itself in its document: 2 H D s for the scores and as
    many for the values. Over a document of n tokens the mean of s is (n + 1) / 2; a window of w tokens caps each s
    at w. Linear attention in chunks of C tokens does, per head of width d, 4 d^2 with the state (read and update) and 4 C d inside the chunk (two
    full C x C products), whatever the lengths.

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
    parts["mlp"] = 2.0 * model.layers * 3 * model.ffn_width * model.hidden
    parts["output"] = 2.0 * model.padded_vocab * model.hidden
    return parts


def _mixing(model: Model, kind: str, lengths: Sequence[int], tokens: int) -> float:
    """FLOPs per token of one layer between its projections."""
    if kind == "L":
        d = model.linear_head_width
        return float(model.linear_heads * (4 * d * d + 4 * CHUNK * d))
    window = model.window if kind == "W" else None
    return 4.0 * model.heads * model.head_width * sum(_visible(n, window) for n in lengths) / tokens


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
