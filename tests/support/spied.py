"""What the kernels of token mixers are given, and the FLOPs that follow from it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

from support.kept import KERNELS

TOKENS = 64  # of the one document


@contextmanager
def spied_kernels() -> Iterator[list[dict[str, Any]]]:
    """What the kernel of each layer is given: its name, the shapes of tensors, and other options."""
    found: list[dict[str, Any]] = []

    def watched(name: str, real: Any, q: Any, k: Any, v: Any, *ranks: Any, **options: Any) -> Any:
        given = {"q": q, "k": k, "v": v, **options}
        found.append({"kernel": name} | {key: tuple(x.shape) if hasattr(x, "shape") else x for key, x in given.items()})
        return real(q, k, v, *ranks, **options)

    with ExitStack() as stack:
        for path in KERNELS:
            module, _, name = path.rpartition(".")
            real = getattr(import_module(module), name)
            stack.enter_context(mock.patch(path, partial(watched, name, real)))
        yield found


def mixing_flops(spied: dict[str, Any]) -> float:
    """FLOPs of a kernel that is given such tensors: of softmax attention pair by pair, of a state in one chunk of all TOKENS."""
    heads, key_heads, k, v = spied["q"][1], spied["k"][1], spied["k"][2], spied["v"][2]
    if spied["kernel"] == "softmax_attention":
        pairs = sum(min(query + 1, spied["mask"].window or TOKENS) for query in range(TOKENS))
        return 2.0 * pairs * heads * (k + v)
    heads, chunk = spied["v"][1], TOKENS
    own = len(spied.get("log_decay") or ()) == 3 or spied.get("beta") is not None  # scores of a head, not of a key head
    state, scores, values = 2 * chunk * k * v, 2 * chunk * chunk * k, 2 * chunk * chunk * v
    flops = heads * (2 * state + values) + (heads if own else key_heads) * scores
    if spied.get("beta") is not None:
        # What the state says of keys, scores of keys, their corrections times keys and values.
        flops += heads * (state + scores + scores + values)
    return flops
