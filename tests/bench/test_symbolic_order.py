"""Which uses of memory on several streams nothing puts in order: rules of CUDA's streams and of torch's allocators, on programs by hand."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as path:  # bench is no installed package
    path.syspath_prepend(str(ROOT))
    from bench.symbolic.order import HOST, Access, Memory, Order
    from bench.symbolic.stores import stored


SIDE, MAIN = "side", "main"


class Program:
    """Work on streams, told to an `Order`."""

    def __init__(self) -> None:
        self.order = Order()

    def work(self, stream: str, memory: Memory, what: str, *, writes: bool, place: tuple[int, int] = (0, 8)) -> None:
        self.order.access(memory, place, Access(stream, self.order.issue(stream), what), writes=writes)

    def wait(self, stream: str, other: str) -> None:
        """`stream` waits for an event that `other` records now."""
        self.order.waits(stream, self.order.now(other))

    @property
    def faults(self) -> list[str]:
        return list(self.order.faults)


def test_one_stream_is_in_order() -> None:
    program, memory = Program(), Memory(MAIN)
    for writes in (True, False, True):
        program.work(MAIN, memory, "kernel", writes=writes)
    program.order.free(memory, "reuse")
    assert program.faults == []


@pytest.mark.parametrize(
    ("first", "second", "faults"), [(True, False, 1), (False, True, 1), (True, True, 1), (False, False, 0)]
)
def test_two_streams_have_to_wait_unless_both_read(first: bool, second: bool, faults: int) -> None:
    program, memory = Program(), Memory(MAIN)
    program.work(MAIN, memory, "one", writes=first)
    program.work(SIDE, memory, "other", writes=second)
    assert len(program.faults) == faults, program.faults


def test_an_event_puts_them_in_order_once_it_is_waited_for_after_the_work() -> None:
    program, memory = Program(), Memory(MAIN)
    early = program.order.now(MAIN)
    program.work(MAIN, memory, "write", writes=True)
    late = program.order.now(MAIN)
    program.order.waits(SIDE, early)
    program.work(SIDE, memory, "too early", writes=False)
    assert [fault.split()[0] for fault in program.faults] == ["too"]
    program.order.waits("third", late)
    program.work("third", memory, "read", writes=False)
    assert len(program.faults) == 1


def test_waiting_passes_on() -> None:
    program, memory = Program(), Memory(MAIN)
    program.work(MAIN, memory, "write", writes=True)
    program.wait(SIDE, MAIN)
    program.wait("third", SIDE)
    program.work("third", memory, "read", writes=False)
    assert program.faults == []


def test_the_host_puts_in_order_what_it_waits_for() -> None:
    program, memory = Program(), Memory(MAIN)
    program.work(MAIN, memory, "write", writes=True)
    program.order.waits(HOST, program.order.now(MAIN))
    program.work(SIDE, memory, "read", writes=False)
    assert program.faults == []


def test_parts_of_one_memory_are_told_apart() -> None:
    program, memory = Program(), Memory(MAIN)
    program.work(MAIN, memory, "first half", writes=True, place=(0, 4))
    program.work(SIDE, memory, "second half", writes=True, place=(4, 8))
    assert program.faults == []
    program.work(SIDE, memory, "the middle", writes=False, place=(3, 5))
    assert len(program.faults) == 1
    assert "the middle" in program.faults[0]
    assert "first half" in program.faults[0]
    program.work(SIDE, memory, "the rest", writes=False, place=(5, 8))
    assert len(program.faults) == 1


def test_a_pinned_buffer_is_not_filled_again_before_its_copy_has_ended() -> None:
    program, buffer = Program(), Memory(HOST)
    program.work(HOST, buffer, "fill", writes=True)
    program.work(SIDE, buffer, "copy", writes=False)
    program.work(HOST, buffer, "fill again", writes=True)
    assert len(program.faults) == 1
    assert "fill again" in program.faults[0]
    waiting, buffer = Program(), Memory(HOST)
    waiting.work(SIDE, buffer, "copy", writes=False)
    waiting.order.waits(HOST, waiting.order.now(SIDE))
    waiting.work(HOST, buffer, "fill again", writes=True)
    assert waiting.faults == []


def test_memory_is_free_once_the_host_has_waited() -> None:
    program, memory = Program(), Memory(MAIN)
    program.work(SIDE, memory, "write", writes=True)
    program.order.waits(HOST, program.order.now(SIDE))
    program.order.free(memory, "reuse")
    assert program.faults == []


@pytest.mark.parametrize(("recorded", "waited", "faults"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_memory_goes_back_to_its_stream_at_once(recorded: bool, waited: bool, faults: int) -> None:
    """Unless the allocator was told of the other stream, or its own has waited for it."""
    program, memory = Program(), Memory(MAIN)
    program.wait(SIDE, MAIN)
    program.work(SIDE, memory, "write", writes=True)
    if recorded:
        memory.recorded.add(SIDE)
    if waited:
        program.wait(MAIN, SIDE)
    program.order.free(memory, "reuse")
    assert len(program.faults) == faults, program.faults


def test_what_a_kernel_stores_is_followed_to_its_parameters() -> None:
    pytest.importorskip("triton")
    from lsys.kernels.linear_attention.gpu.compose import compose_kernel
    from lsys.kernels.linear_attention.gpu.delta.passes import states_pass
    from lsys.kernels.short_convolution.short_convolution_triton import convolution_gradients_kernel
    from lsys.kernels.softmax_attention.merge_triton import merge_kernel

    # Sizes, which addresses are made of, are no tensors.
    assert stored(compose_kernel) & {"update", "transition", "begin", "out", "end", "segments"} == {"out", "end"}
    read = {"x", "others", "weight", "bias", "dy", "behind", "ahead", "kept"}
    written = {"dx", "d_kept", "d_taps"}
    assert stored(convolution_gradients_kernel) & (read | written) == written
    assert stored(merge_kernel) & {"o", "lse", "other_o", "other_lse", "rows"} == {"o", "lse"}
    assert stored(states_pass) & {"k", "w", "u", "b", "start", "end", "kept", "r_kept", "spans"} == {
        "end",
        "kept",
        "r_kept",
    }  # by functions that it calls
