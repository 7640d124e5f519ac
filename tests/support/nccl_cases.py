"""Programs of all ranks, drawn by a fixed seed, and what each rank of them issues: every way to cross the ranks of a sequence."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lsys.kernels import softmax_attention as kernel
from lsys.parallel.attention import softmax_attention
from lsys.parallel.convolution import short_convolution, token_shift
from lsys.parallel.halo import halo, halo_state
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import linear_attention
from lsys.parallel.messages import chain, ring
from lsys.parallel.methods import SOFTMAX, STATE
from support.layouts import random_layout
from support.linear import VARIANTS, fragments, idle_first
from support.masks import SHARES, arguments
from support.nccl_order import AloneComm, Queue, queues_of

SEED = 5
WIDTH = 4  # of a head
RANKS = (2, 8, 3, 4, 6, 2, 4, 5, 6, 7)
LENGTHS = (0, 1, 2, 5, 13, 31, 64)
LAYOUTS: dict[str, Callable[[tuple[int, ...], int], SequenceLayout]] = {
    "contiguous": SequenceLayout.contiguous,
    "zigzag": SequenceLayout.zigzag,
    "random": lambda lengths, ranks: random_layout(lengths, ranks, seed=sum(lengths)),
    "fragments": lambda lengths, ranks: fragments([min(length, 31) for length in lengths], ranks),
    "idle ranks": idle_first,
}
MASKS: list[dict[str, Any]] = [{}, {}, {"causal": False}, {"window": 1}, {"window": 5}, {"window": 40}, *SHARES]
USED = ("outputs", "states", "both", "states on one rank")

# Methods whose ranks send each other nothing but in collectives.
COLLECTIVES_ONLY = {"softmax ulysses", "state lasp2", "state ulysses"}
METHODS = [*(f"softmax {name}" for name in SOFTMAX), *(f"state {name}" for name in STATE)]
SINGLE = METHODS + ["halo", "halos", "convolution", "shift"]
# How many cases are drawn of each layer by itself, and of several layers.
OPERATIONS = {
    **{name: 8 if name in COLLECTIVES_ONLY else 24 for name in METHODS},
    **dict.fromkeys(SINGLE[len(METHODS) :], 26),
    "in turn": 25,
    "side by side": 30,
}


# ---- layers


def _parted(q: Tensor, k: Tensor, v: Tensor, apart: str, differentiable: bool) -> list[Tensor]:
    """The three, those that `apart` names independent of the layer's input, and leaves of their own if `differentiable`."""
    parts = {"q": q, "k": k, "v": v}
    return [x.detach().requires_grad_(differentiable) if name in apart else x for name, x in parts.items()]


def _softmax(
    x: Tensor, layout: SequenceLayout, comm: AloneComm, kv: int, apart: tuple[str, bool], **options: Any
) -> Tensor:
    q, k, v = _parted(x, x[:, :kv], x[:, -kv:], *apart)
    method = options.pop("method")
    return softmax_attention(q, k, v, layout, comm, method=method, **arguments(options, len(layout.lengths)))


def _state(
    x: Tensor,
    layout: SequenceLayout,
    comm: AloneComm,
    kv: int,
    apart: tuple[str, bool],
    variant: str,
    used: str,
    **options: Any,
) -> Tensor:
    """`used`: what of the results has a gradient, where there are final states; these may have it on one rank alone."""
    q, k, v = _parted(x[:, :kv], x[:, -kv:], x, *apart)
    *delta, decay = variant.split()
    decays = {
        "none": None,
        "head": x.new_zeros(x.shape[1], requires_grad=True),
        "token": -v.sum(-1).abs(),
        "channel": -v.abs(),
    }
    if options.pop("initial"):
        options["initial_state"] = x.new_zeros(len(layout.lengths), x.shape[1], WIDTH, WIDTH, requires_grad=True)
    beta = v.sum(-1).sigmoid() if delta else None
    o, final = linear_attention(q, k, v, layout, comm, log_decay=decays[decay], beta=beta, **options)
    if final is None or used == "outputs" or (used == "states on one rank" and comm.rank):
        return o
    states = final.sum().expand_as(o)
    return states if used == "states" else o + states


def _halo(x: Tensor, layout: SequenceLayout, comm: AloneComm, k: int) -> Tensor:
    extended = halo(x, layout, comm, k)
    return extended.x[extended.own] + extended.x.sum()


def _halos(x: Tensor, layout: SequenceLayout, comm: AloneComm, k: int) -> Tensor:
    return x + halo_state(x, layout, comm, k).sum()


def _convolution(x: Tensor, layout: SequenceLayout, comm: AloneComm, width: int) -> Tensor:
    weight = x.new_zeros(x.shape[1] * WIDTH, width, requires_grad=True)
    return short_convolution(x.flatten(1), weight, layout, comm).view(x.shape)


KINDS: dict[str, Callable[..., Tensor]] = {
    "softmax": _softmax,
    "state": _state,
    "halo": _halo,
    "halos": _halos,
    "convolution": _convolution,
    "shift": token_shift,
}


class Layer(NamedTuple):
    """A layer by the first word of its name, of [T_r, H, WIDTH] -> the same."""

    name: str
    options: dict[str, Any]

    def __call__(self, x: Tensor, layout: SequenceLayout, comm: AloneComm) -> Tensor:
        return KINDS[self.name.split()[0]](x, layout, comm, **self.options)


def _drawn_layer(name: str, draw: random.Random, heads: int) -> Layer:
    kind, _, method = name.partition(" ")
    if kind in ("halo", "halos"):
        return Layer(name, {"k": draw.choice((1, 3, 40))})
    if kind == "convolution":
        return Layer(name, {"width": draw.choice((2, 4))})
    if kind == "shift":
        return Layer(name, {})
    kv = draw.choice([number for number in range(1, heads + 1) if heads % number == 0])
    apart = draw.choice(("", "", "q", "kv", "kv")), draw.random() < 0.5
    options: dict[str, Any] = {"method": method, "kv": kv, "apart": apart}
    if kind == "softmax":
        return Layer(name, options | draw.choice(MASKS))
    options |= {"variant": draw.choice(VARIANTS), "used": draw.choice(USED)}
    causal = draw.random() < 0.8
    ends = {key: causal and draw.random() < 0.4 for key in ("initial", "output_final_state")}
    return Layer(name, options | ends | {"causal": causal})


# ---- cases


class Case(NamedTuple):
    """One program: layers over one layout, one after the other, or all of the same inputs and summed.

    Attributes:
        nodes: of each rank.
        again: recomputed in backward by a reentrant checkpoint (True) or another one (False); None: not recomputed.
        inputs_alone: whether backward is for the gradients of the inputs, not of all leaves.
    """

    layout: str
    lengths: tuple[int, ...]
    nodes: tuple[int, ...]
    heads: int
    layers: tuple[Layer, ...]
    side_by_side: bool
    again: bool | None
    inputs_alone: bool


def _drawn(operation: str, number: int) -> Case:
    draw = random.Random(f"{SEED} {operation} {number}")
    ranks = RANKS[number % len(RANKS)]
    lengths = (*(draw.choice(LENGTHS) for _ in range(draw.randrange(4))), draw.choice(LENGTHS[-3:]))
    even = [number for number in range(2, ranks) if ranks % number == 0]
    to_a_node, heads = draw.choice((2, ranks, *even, *even)), draw.choice((1, 4, 6, 12))
    names = [operation] if operation in SINGLE else draw.sample(SINGLE, draw.choice((2, 2, 3)))
    again = draw.choice((None, None, None, True, False))
    return Case(
        layout=draw.choice((*LAYOUTS, "contiguous", "zigzag", "zigzag")),
        lengths=lengths,
        nodes=tuple(rank // to_a_node for rank in range(ranks)),
        heads=heads,
        layers=tuple(_drawn_layer(name, draw, heads) for name in names),
        side_by_side=operation == "side by side",
        again=again,
        inputs_alone=not again and draw.random() < 0.5,  # which reentrant checkpoints do not know
    )


@cache
def cases(operation: str) -> list[tuple[Case, list[Queue]]]:
    """The cases of an operation, and what each rank issues in them. Kept, for several tests look at them."""
    drawn = (_drawn(operation, number) for number in range(OPERATIONS[operation]))
    return [(case, _issued(case)) for case in drawn]


def _issued(case: Case) -> list[Queue]:
    layout = LAYOUTS[case.layout](case.lengths, len(case.nodes))

    def model(x: Tensor, comm: AloneComm) -> Tensor:
        if case.side_by_side:
            return torch.stack([layer(x, layout, comm) for layer in case.layers]).sum(0)
        for layer in case.layers:
            x = layer(x, layout, comm)
        return x

    def program(comm: AloneComm) -> None:
        x = torch.zeros(layout.tokens(comm.rank), case.heads, WIDTH, requires_grad=True)
        y = model(x, comm) if case.again is None else checkpoint(model, x, comm, use_reentrant=case.again)
        y.sum().backward(inputs=[x] if case.inputs_alone else None)

    with ExitStack() as stack:
        # As many rounds and blocks as long documents and large states have.
        stack.enter_context(mock.patch.object(ring, "_TOKENS", 8))
        stack.enter_context(mock.patch.object(chain, "LATENCY_BYTES", 16))
        # What is attended to in each step costs half of the time, and says nothing of what is sent.
        for name in ("attend", "attend_backward"):
            stack.enter_context(mock.patch.object(kernel, name, lambda *tensors, **options: None))
        return queues_of(case.nodes, program)
