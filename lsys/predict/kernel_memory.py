"""Bytes that the kernels of token mixers keep and use: as `lsys.kernels` has them in torch operations, on CPUs and where no kernel is fused.

In chunks of C tokens, H heads, keys of width K, values of width V. Kernels go through a sequence in blocks of chunks
(`lsys.kernels.linear_attention.chunked.blocks`) and keep their inputs alone; of segments whose states come from or go to other ranks, also
the states before the chunks.
"""

from __future__ import annotations

from lsys.mixers.card import Layer
from lsys.mixers.state import StateCard
from lsys.predict.deployment import Deployment

SIZES = (16, 32, 64, 128, 256)  # of chunks, as `lsys.kernels.linear_attention.chunked.grid`
BLOCK, GPU_BLOCK = 2**18, 2**23  # elements of a block, as `lsys.kernels.linear_attention.chunked.blocks`

# Elements a token that are alive at the peak of a kernel's backward pass beside its inputs, their gradients and that of its output:
# of keys, values, H K, H C, H K V / C, H K^2 / C, by the variant of the kernel. Counted from live tensors; decays of channels and the
# delta rule may have more, by `_counts`.
Counts = tuple[float, ...]
WHOLE: dict[str, Counts] = {
    "head": (6, 6, 4, 3, 3, 0),
    "channel": (2, 6, 18, 2, 3, 0),
    "token": (5, 6, 4, 5, 3, 0),
    "delta": (8, 6, 8, 8, 3, 1),
    "channel delta": (4, 6, 16, 7, 3, 1),
}

# The same of segments with external state, whose backward pass goes through all blocks once for states, once for outputs and once for maps:
# of a block, and of all tokens, what one turn tells the next.
EXTERNAL: dict[str, Counts] = {
    "head": (5, 1, 4, 2, 0, 0),
    "channel": (2, 1, 14, 2, 0, 0),
    "token": (5, 1, 3, 4, 0, 0),
    "delta": (4, 4, 3, 5, 1, 0),
    "channel delta": (2, 4, 11, 5, 1, 0),
}
ACROSS: dict[str, Counts] = {
    **dict.fromkeys(("head", "channel", "token"), (0, 1, 0, 0, 1, 0)),
    **dict.fromkeys(("delta", "channel delta"), (0, 2, 2, 0, 1, 0)),
}

# The same of what is kept of segments with external state beside their inputs: the states before chunks, and how far these reach.
SAVED: dict[str, Counts] = {
    **dict.fromkeys(("head", "channel", "token"), (0, 0, 0, 0, 1, 0)),
    **dict.fromkeys(("delta", "channel delta"), (0, 0, 0, 0, 1, 1)),
}

# Variants with a fused kernel on GPUs (`lsys.kernels.linear_attention.gpu`); the others run in chunks there too.
FUSED = frozenset(("head", "channel", "token", "delta"))


def variant(card: StateCard) -> str:
    """The kernel's variant, which the tables here are by."""
    if card.delta:
        return "channel delta" if card.decay == "channel" else "delta"
    return "head" if card.decay == "none" else card.decay


def chunk_size(lengths: list[int], key_width: int, value_width: int) -> int:
    """Tokens of a chunk with the least estimated work, as `lsys.kernels.linear_attention.chunked.grid.chunk_size` chooses them."""
    move, start = 32, 50_000
    costs = []
    for size in SIZES:
        chunks = [-(-length // size) for length in lengths]
        width, state = key_width + value_width, key_width * value_width
        inside = size * size * (width + move) + size * width * move
        across = 2 * size * state + state * move
        many = sum(n for n in chunks if n > 1)
        costs.append(sum(chunks) * inside + many * across + max(chunks, default=0) * start)
    return SIZES[costs.index(min(costs))]


def _widths(deployment: Deployment, layer: Layer) -> tuple[int, int, int, int, int]:
    """H, H_k, K, V of a tensor rank, and C."""
    card, t = _card(deployment, layer), deployment.mesh.tensor
    k = card.widened(layer.is_first)
    external = has_external_state(deployment, layer)  # else documents are whole, or were put together
    parts = 2 if external and deployment.config.parallel.layout == "zigzag" else 1
    length = max(1, max(deployment.documents) // (parts * deployment.mesh.context if external else 1))
    return card.heads // t, card.key_heads // t, k, card.value_width, chunk_size([length] * parts, k, card.value_width)


def _card(deployment: Deployment, layer: Layer) -> StateCard:
    card = deployment.cards[layer.mixer]
    assert isinstance(card, StateCard)
    return card


def _counts(card: StateCard, external: bool, size: int, grouped: bool) -> Counts:
    """Counts of a block of chunks of `size` tokens. Where heads share keys, scores that decays or corrections are in have copies for each.

    With a decay a channel, chunks are halved down to spans of 4, and the decays into and out of halves are kept at each level: of the
    scores of queries and, at the same time but where segments have external state, of those of keys.
    """
    keys, values, heads, *others = (EXTERNAL if external else WHOLE)[variant(card)]
    channel = card.decay == "channel"
    scores = 2 if card.delta and not external else 1
    heads += 2 * (grouped and (channel or card.delta)) + (scores * ((size // 4).bit_length() - 1) if channel else 0)
    return keys, values, heads, *others


def _elements(deployment: Deployment, layer: Layer, counts: Counts) -> float:
    """Elements a token, by their counts."""
    heads, key_heads, k, v, c = _widths(deployment, layer)
    sizes = (key_heads * k, heads * v, heads * k, heads * c, heads * k * v / c, heads * k * k / c)
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def intermediate(deployment: Deployment, layer: Layer, tokens: float = 1.0, room: float = 1.0) -> float:
    """Elements that a kernel makes on its way, of so many tokens, `room` of them in a block."""
    heads, key_heads, *_, size = _widths(deployment, layer)
    external = has_external_state(deployment, layer)
    found = room * _elements(deployment, layer, _counts(_card(deployment, layer), external, size, heads > key_heads))
    return (
        found + tokens * _elements(deployment, layer, ACROSS[variant(_card(deployment, layer))]) if external else found
    )


def least(deployment: Deployment, layer: Layer) -> float:
    """Bytes a token that a fused kernel of linear attention reads and writes at the least, forward."""
    heads, key_heads, k, v, _ = _widths(deployment, layer)
    return deployment.itemsize * (2 * key_heads * k + 2 * heads * v) + 4 * _card(deployment, layer).gates(
        deployment.mesh.tensor
    )


def linear_workspace(deployment: Deployment, layer: Layer) -> float:
    """Bytes of a backward pass: gradients of the inputs, of the output and of what gates it, and intermediate results."""
    heads, key_heads, k, v, c = _widths(deployment, layer)
    b, tokens = deployment.itemsize, deployment.slots
    whole = b * (2 * key_heads * k + (3 if b == 4 else 4) * heads * v) + 4 * _card(deployment, layer).gates(
        deployment.mesh.tensor
    )
    block = GPU_BLOCK if deployment.gpu and not is_fused(deployment, layer) else BLOCK
    room = c * max(1, block // (c * max(1, heads * max(k, v))))
    return tokens * whole + 4 * intermediate(deployment, layer, tokens, min(tokens, room))


def is_fused(deployment: Deployment, layer: Layer) -> bool:
    """Whether the kernel is one for GPUs that makes no intermediate results in memory."""
    return deployment.gpu and variant(_card(deployment, layer)) in FUSED


def has_external_state(deployment: Deployment, layer: Layer) -> bool:
    """Whether states come from and go to other ranks."""
    return (
        deployment.mesh.context > 1
        and deployment.cards[layer.mixer].has_state
        and not deployment.methods[layer.mixer].whole
    )


def linear_saved(deployment: Deployment, layer: Layer) -> float:
    """Bytes that the kernel itself keeps where segments have external state; else nothing but its inputs and output, which mixers count.

    The gather of states (`lasp2`) keeps all ranks' where their transitions travel beside them.
    """
    if not has_external_state(deployment, layer):
        return 0.0
    card = _card(deployment, layer)
    heads, _, k, v, _ = _widths(deployment, layer)
    runs = (
        (2 * deployment.mesh.context - 1) if deployment.config.parallel.layout == "zigzag" else deployment.mesh.context
    )
    own: float = 2 if deployment.config.parallel.layout == "zigzag" else 1
    if (card.delta or card.decay in ("token", "channel")) and deployment.methods[layer.mixer].transitions:
        own += runs * (1 + (k / v if card.delta else 1 / v if card.decay == "channel" else 0))
    return 4.0 * (deployment.slots * _elements(deployment, layer, SAVED[variant(card)]) + own * heads * k * v)


def attention_workspace(deployment: Deployment, layer: Layer) -> float:
    """Bytes of softmax attention's backward pass: gradients of queries, keys, values, and its output's."""
    card, t = deployment.cards[layer.mixer], deployment.mesh.tensor
    return deployment.slots * deployment.itemsize * (card.in_width + card.out_width) / t


def workspace(deployment: Deployment, layer: Layer) -> float:
    """Bytes of the backward pass of a mixer's kernel."""
    return (
        linear_workspace(deployment, layer)
        if deployment.cards[layer.mixer].has_state
        else attention_workspace(deployment, layer)
    )
