"""What the nodes of two phases hand each other: wrong orders are refused, right ones go on and keep nothing."""

import gc
import weakref
from typing import Any

import pytest
import torch
from support.comparing import largest
from support.linear_kernels import VARIANTS, error, tensors

from lsys.kernels.linear_attention import segments
from lsys.kernels.linear_attention.chunked import ChunkedSegments, blocks

LENGTHS, EXTERNAL = [70, 0, 150, 9], [0, 2]
ONCE = "`segment_map`, `intra` and `apply` are called once each, in this order; make new `segments` for another call"


class Call:
    """Two phases of tokens that begin with the states [L, H, K, V] of `inputs`."""

    def __init__(self, variant="delta token", backend="chunked", frozen=()):
        self.inputs = tensors(variant, LENGTHS)
        q, k, v, state, log_decay, beta = self.inputs[:6]
        self.state: Any = state[EXTERNAL].detach().requires_grad_()
        self.tokens = [x for x in (q, k, v, log_decay, beta) if x is not None]
        kinds = {"tokens": self.tokens, "state": [self.state], "queries": [q], "others": self.tokens[1:]}
        for x in (x for name in frozen for x in kinds[name]):
            x.requires_grad_(False)
        flat: list[Any] = [x if x is None or x.dim() == 1 else x[0] for x in (q, k, v, log_decay, beta)]
        self.phases: Any = segments(flat[0], flat[1], flat[2], flat[3], flat[4], LENGTHS, EXTERNAL, backend=backend)

    def output(self):
        self.map, self.intra = self.phases.segment_map(), self.phases.intra()
        self.o = self.phases.apply(self.map, self.intra, self.state)
        return self.o

    @property
    def left(self):
        """What is handed over and not taken yet."""
        handover = self.phases.work.handover
        return [*handover.maps, *handover.written, *handover.queries], handover.under_way


def refused(message):
    return pytest.raises(RuntimeError, match=f"linear attention in two phases: {message}")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 2**10)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_steps_out_of_turn_are_refused(grad):
    with torch.set_grad_enabled(grad):
        one = Call()
        found, somebodys = one.phases.segment_map(), torch.zeros_like(one.inputs.v[0])
        with refused(f"`apply` comes after `segment_map`, but it goes on from `intra`: {ONCE}"):
            one.phases.apply(found, somebodys, one.state)
        intra = one.phases.intra()
        with refused(f"`intra` comes after `intra`, but it goes on from `segment_map`: {ONCE}"):
            one.phases.intra()
        o = one.phases.apply(found, intra, one.state)
        with refused(f"`apply` comes after `apply`, but it goes on from `intra`: {ONCE}"):
            one.phases.apply(found, intra, one.state)
        with refused(f"`intra` comes after `apply`, but it goes on from `segment_map`: {ONCE}"):
            one.phases.intra()
        with refused(f"`apply` comes after nothing, but it goes on from `intra`: {ONCE}"):
            Call().phases.apply(found, somebodys, one.state)
        assert torch.equal(o, Call().output()) and one.left == ([], None)  # what was refused has changed nothing


def test_a_gradient_of_what_intra_gives_alone_is_refused():
    one = Call()
    one.phases.segment_map()
    with refused(
        "what `intra` gives has a gradient, but `apply` was not called; only the output of `apply` is complete"
    ):
        one.phases.intra().sum().backward()
    one = Call()
    one.output()
    with refused("what `intra` gives has a gradient that is not of the output of `apply`; use that output alone"):
        one.intra.sum().backward()


@pytest.mark.parametrize("wanted", ["state", "intra"])
def test_what_a_pass_leaves_is_not_taken_for_another_s(wanted):
    """Gradients that end at `apply`: neither of states before segments, nor of `intra` as an end, may start another pass."""
    one = Call()
    o, end = one.output(), {"state": one.state, "intra": one.intra}[wanted]
    torch.autograd.grad(o.sum(), end, retain_graph=True)
    with refused("what `intra` gives has a gradient that is not of the output of `apply`"):
        torch.autograd.grad(one.intra.sum(), one.tokens, retain_graph=True)
    right = torch.autograd.grad(o.sum(), one.tokens)
    assert all(torch.equal(x, y) for x, y in zip(right, whole(Call()), strict=True))


def whole(call):
    return torch.autograd.grad(call.output().sum(), call.tokens)


def test_the_ticket_without_intra_is_refused():
    one = Call()
    one.output()
    ticket = one.phases.mapped[2]
    with refused(
        "the ticket of the maps has a gradient, but that of `intra` was not taken; the ticket is for `intra` alone"
    ):
        torch.autograd.grad(ticket, one.tokens[1:], torch.zeros(0, dtype=ticket.dtype), allow_unused=True)


def test_a_second_backward_pass_needs_the_graph():
    """Autograd refuses, node by node, before what they hand each other is touched."""
    one = Call()
    one.output().sum().backward()
    for loss in (one.o, one.intra, one.map.state):
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.sum().backward()
        assert one.left == ([], None)
    one = Call()
    first = torch.autograd.grad(one.output().sum(), one.tokens, retain_graph=True)
    second = torch.autograd.grad(one.o.sum(), one.tokens)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("broken", ["intra", "maps"])
def test_a_pass_that_breaks_off_does_not_spoil_the_next(broken, monkeypatch):
    one = Call()
    o, of = one.output(), one.phases.variant
    name = {"intra": "read_gradients", "maps": "map_gradients"}[broken]
    with monkeypatch.context() as patch:
        patch.setattr(of, name, lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            torch.autograd.grad(o.sum(), one.tokens, retain_graph=True)
    again = torch.autograd.grad(o.sum(), one.tokens)
    assert all(torch.equal(x, y) for x, y in zip(again, whole(Call()), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_handed_over_is_gone_when_it_was_taken(variant):
    one = Call(variant)
    assert isinstance(one.phases, ChunkedSegments)
    found = one.phases.segment_map()
    handover = one.phases.work.handover
    assert len(handover.maps) == len(handover.written) == len(one.phases.work.external) > 1
    written = [
        weakref.ref(x) for pair in handover.written if pair is not None for x in pair if isinstance(x, torch.Tensor)
    ]
    updates = [weakref.ref(update) for update, _ in handover.maps]
    assert bool(written) == variant.startswith("delta")
    intra = one.phases.intra()
    queries = [weakref.ref(x) for x in handover.queries]
    gc.collect()
    assert queries and all(x() is not None for x in (*queries, *updates)) and not any(x() is not None for x in written)
    o = one.phases.apply(found, intra, one.state)
    gc.collect()
    assert not any(x() is not None for x in (*queries, *updates)) and one.left == ([], None)
    for ends_early in ([one.inputs.q], [one.state]):  # what these leave goes with the next
        torch.autograd.grad(o.sum(), ends_early, retain_graph=True)
        torch.autograd.grad(o.sum(), [one.inputs.v, one.state], retain_graph=True)
        assert one.left == ([], None)


@pytest.mark.parametrize("frozen", [(), ("tokens",), ("state",), ("tokens", "state"), ("queries",), ("others",)])
def test_outputs_and_gradients_that_some_want_are_the_definition(frozen):
    """With tensors that are not trained, nodes have no gradient, or are not recorded at all."""
    found = []
    for backend in ("chunked", "reference"):
        one = Call(backend=backend, frozen=frozen)
        o, leaves = one.output(), [x for x in (*one.tokens, one.state) if x.requires_grad]
        assert o.requires_grad == bool(leaves)
        found.append([o, *(torch.autograd.grad((o * one.inputs.do[0]).sum(), leaves) if leaves else ())])
        if backend == "chunked":
            assert one.left == ([], None)
    assert len(found[0]) == len(found[1]) and largest(map(error, *found)) < 1e-10
