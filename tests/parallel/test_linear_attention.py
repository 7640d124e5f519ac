"""Linear attention across ranks equals one device: outputs, final states, every gradient; and nothing leaks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lsys.kernels.linear_attention import linear_attention as one_device
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import Segment, SequenceLayout
from lsys.parallel.linear import lasp2, linear_attention

HEADS, KEY_HEADS, KEY, VALUE = 4, 2, 5, 6
TOLERANCE = 1e-10  # fp64, relative
PACKS = {
    "uneven": (0, 1, 7, 53, 2, 131, 1, 0, 29),
    "one long document": (241,),
    "short documents": (3, 1, 2, 5, 1, 1, 4, 2),
}


def shuffled(lengths: tuple[int, ...], ranks: int) -> SequenceLayout:
    """Pieces of up to 17 tokens in random order on random ranks; the last rank, if there are several, holds none."""
    generator = torch.Generator().manual_seed(len(lengths) + ranks)
    placed: list[list[Segment]] = [[] for _ in range(ranks)]
    pieces = [Segment(d, s, min(17, n - s)) for d, n in enumerate(lengths) for s in range(0, n, 17)]
    for index in torch.randperm(len(pieces), generator=generator).tolist():
        placed[int(torch.randint(max(1, ranks - 1), (1,), generator=generator))].append(pieces[index])
    return SequenceLayout(lengths, tuple(map(tuple, placed)))


LAYOUTS = {"contiguous": SequenceLayout.contiguous, "zigzag": SequenceLayout.zigzag, "shuffled": shuffled}


def problem(lengths: tuple[int, ...], decay: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(sum(lengths))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = sum(lengths)
    gates = {"none": None, "fixed": random(HEADS), "token": random(tokens, HEADS)}
    gate = gates[decay]
    return {
        "q": random(tokens, KEY_HEADS, KEY),
        "k": random(tokens, KEY_HEADS, KEY),
        "v": random(tokens, HEADS, VALUE),
        "log_decay": None if gate is None else -0.02 * gate.abs(),  # gentle: what is carried must matter
        "initial_state": random(len(lengths), HEADS, KEY, VALUE),
        "d_o": random(tokens, HEADS, VALUE),
        "d_final": random(len(lengths), HEADS, KEY, VALUE),
    }


INPUTS = ("q", "k", "v", "log_decay", "initial_state")


def on_rank(
    rank: int, world_size: int, pack: str, layout_name: str, decay: str, fault: str | None = None
) -> dict[str, Tensor | None]:
    if fault == "zero carry":
        lasp2.scan = lambda updates, *rest: tuple(map(torch.zeros_like, SCAN(updates, *rest)))
    try:
        return _on_rank(rank, world_size, pack, layout_name, decay)
    finally:
        lasp2.scan = SCAN


SCAN: Any = lasp2.scan


def _on_rank(rank: int, world_size: int, pack: str, layout_name: str, decay: str) -> dict[str, Tensor | None]:
    lengths = PACKS[pack]
    layout, whole = LAYOUTS[layout_name](lengths, world_size), problem(lengths, decay)
    tokens = sum(lengths)
    mine: dict[str, Any] = {
        name: x if x is None or len(x) != tokens or x.dim() == 1 else layout.shard(x, rank) for name, x in whole.items()
    }
    if whole["initial_state"] is not None:
        mine["initial_state"], mine["d_final"] = whole["initial_state"], whole["d_final"] / world_size
    leaves = {name: mine[name].clone().requires_grad_() for name in INPUTS if mine[name] is not None}
    o, final = linear_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        layout,
        SequenceComm(None) if world_size > 1 else None,
        log_decay=leaves.get("log_decay"),
        initial_state=leaves["initial_state"],
        output_final_state=True,
    )
    torch.autograd.backward([o, final], [mine["d_o"], mine["d_final"]])
    return {"o": o.detach(), "final": final.detach(), **{f"d_{name}": x.grad for name, x in leaves.items()}}


def reference(pack: str, decay: str) -> dict[str, Tensor]:
    lengths = PACKS[pack]
    whole = problem(lengths, decay)
    leaves = {name: x.clone().requires_grad_() for name in INPUTS if (x := whole[name]) is not None}
    gate = leaves.get("log_decay")
    o, final = one_device(
        leaves["q"][None],
        leaves["k"][None],
        leaves["v"][None],
        gate if gate is None or gate.dim() == 1 else gate[None],
        initial_state=leaves["initial_state"],
        output_final_state=True,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        backend="reference",
    )
    assert final is not None
    torch.autograd.backward([o[0], final], [whole["d_o"], whole["d_final"]])
    return {"o": o[0].detach(), "final": final.detach(), **{f"d_{n}": x.grad for n, x in leaves.items()}}  # type: ignore[dict-item]


def errors(outcomes: list[dict[str, Any]], layout: SequenceLayout, exact: dict[str, Tensor]) -> dict[str, float]:
    merged = {}
    for name in exact:
        parts = [outcome[name] for outcome in outcomes]
        if name == "final":
            assert all(torch.equal(part, parts[0]) for part in parts)
            merged[name] = parts[0]
        elif name == "d_initial_state" or exact[name].dim() == 1:
            merged[name] = torch.stack(parts).sum(0)  # replicated inputs: the parts add up
        else:
            merged[name] = layout.unshard(parts)
    return {name: float((merged[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_one_device(gloo: Any, ranks: int, layout_name: str) -> None:
    for pack, lengths in PACKS.items():
        for decay in ("none", "fixed", "token"):
            outcomes = gloo(ranks, on_rank, pack, layout_name, decay)
            measured = errors(outcomes, LAYOUTS[layout_name](lengths, ranks), reference(pack, decay))
            assert max(measured.values()) < TOLERANCE, (pack, decay, measured)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_a_zeroed_carry_is_noticed(gloo: Any, layout_name: str) -> None:
    layout = LAYOUTS[layout_name](PACKS["one long document"], 3)
    exact = reference("one long document", "fixed")
    without = gloo(3, on_rank, "one long document", layout_name, "fixed", "zero carry")
    carried = layout.unshard([outcome["o"] for outcome in without]) - exact["o"]
    assert carried.norm() > 0.1 * exact["o"].norm()


def perturbed(rank: int, world_size: int, layout_name: str, position: int | None) -> Tensor:
    lengths = (5, 149, 40)
    layout, whole = LAYOUTS[layout_name](lengths, world_size), problem(lengths, "fixed", torch.float32)
    parts: dict[str, Any] = {}
    for name in ("q", "k", "v"):
        x = whole[name].clone()  # type: ignore[union-attr]
        if position is not None:
            x[position] += 1
        parts[name] = layout.shard(x, rank)
    o, _ = linear_attention(
        parts["q"], parts["k"], parts["v"], layout, SequenceComm(None), log_decay=whole["log_decay"]
    )
    return o


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_causal_bit_by_bit(gloo: Any, layout_name: str) -> None:
    layout = LAYOUTS[layout_name]((5, 149, 40), 3)
    base = layout.unshard(gloo(3, perturbed, layout_name, None))
    for position in (
        6,
        60,
        61,
        153,
        154,
    ):  # in the second document (stream places 5 to 153) and at the start of the third
        changed = layout.unshard(gloo(3, perturbed, layout_name, position))
        stop = 154 if position < 154 else 194
        begin = 5 if position < 154 else 154
        assert torch.equal(changed[begin:position], base[begin:position])
        assert torch.equal(changed[:begin], base[:begin]) and torch.equal(changed[stop:], base[stop:])
        assert not torch.equal(changed[position:stop], base[position:stop])


def collectives(rank: int, world_size: int, lengths: tuple[int, ...], layout_name: str) -> list[int]:
    layout = LAYOUTS[layout_name](lengths, world_size)
    comm, calls = SequenceComm(None), []
    gather = comm.all_gather_async
    comm.all_gather_async = lambda x, sizes=None: (calls.append(x.numel()), gather(x, sizes))[1]  # type: ignore[method-assign]
    q, k, v = (torch.randn(layout.tokens(rank), 2, 4, requires_grad=True) for _ in range(3))
    o, _ = linear_attention(q, k, v, layout, comm)
    o.sum().backward()
    return calls


def test_one_collective_each_way_and_none_without_crossing(gloo: Any) -> None:
    state = 2 * 4 * 4
    for calls in gloo(2, collectives, (64,), "contiguous"):
        assert calls == [2 + state, state]  # log-decay and state forward, gradient of the state backward
    for calls in gloo(2, collectives, (32, 32), "contiguous"):
        assert calls == []
    for calls in gloo(2, collectives, (16, 40, 8), "contiguous"):
        assert calls == [2 + state, state]  # only the document that crosses


def test_refusals() -> None:
    layout = SequenceLayout.contiguous((8,), 2)
    x = torch.randn(8, 2, 4)
    one = SequenceLayout.contiguous((8,), 1)
    with pytest.raises(ValueError, match="layout is of 2 ranks"):
        linear_attention(x, x, x, layout, None)
    with pytest.raises(ValueError, match="'ring' is not one of: lasp2"):
        linear_attention(x, x, x, one, None, method="ring")
    with pytest.raises(ValueError, match="holds 8 tokens"):
        linear_attention(x[:5], x[:5], x[:5], one, None)
    with pytest.raises(ValueError, match="must not be positive"):
        linear_attention(x, x, x, one, None, log_decay=torch.tensor([0.1, -0.1]))
    with pytest.raises(ValueError, match="delta rule"):
        linear_attention(x, x, x, one, None, beta=torch.ones(8, 2))
    with pytest.raises(ValueError, match="initial_state must be"):
        linear_attention(x, x, x, one, None, initial_state=torch.zeros(3, 2, 4, 4))
