"""The methods of the sequence axis, each once: its name, what it is like, what it sends and who runs it. Needs no torch.

Configuration, executors, predictor and benchmarks read this; nobody else decides by a method's name. A new method is its
formulas (`lsys.parallel.messages`), what runs it (`lsys.parallel.attention` or `.linear`) and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from lsys.parallel.messages import attention, chain, gather, lasp2, ring, ulysses, usp
from lsys.parallel.messages.heads import GroupsOf, alone, everyone
from lsys.parallel.messages.placement import Phases


@dataclass(frozen=True)
class Method:
    """One way in which softmax layers, or layers with a state, cross the ranks of a sequence.

    Attributes:
        name: in the configuration.
        phases: the messages of one layer: softmax (place, shape, nodes, mask, backend), states (place, shape), causal.
        run: "module:function" that makes what is run. Softmax: a schedule between groups, (layout, mask). States: the
            exchange of a call; of a method with whole documents the whole of `linear_attention`.
        summary: what it does, after its name.
        groups: inside which ranks exchange heads for tokens, of (nodes, query heads).
        ends: so many phases before the mixer's work exchange heads for tokens, and as many after it.
        collective: whether its other phases are operations of all ranks, not messages between two.
        whole: whether each rank has all tokens of its documents, for its share of the heads.
        transitions: whether those of states travel beside them, and all ranks' are kept for backward.
    """

    name: str
    phases: Callable[..., Phases]
    run: str
    summary: str
    groups: GroupsOf = alone
    ends: int = 0
    collective: bool = False
    whole: bool = False
    transitions: bool = False

    def function(self) -> Any:
        """What `run` names; imported when first asked for, since it needs torch."""
        module, name = self.run.split(":")
        return getattr(import_module(module), name)


def _softmax(name: str, between: attention.Between, run: str, summary: str, groups: GroupsOf, **more: Any) -> Method:
    return Method(name, partial(attention.phases, groups, between), run, summary, groups, **more)


def _by_name(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


_RING, _GATHER = "lsys.parallel.attention.ring:schedule", "lsys.parallel.attention.gather:schedule"

# In doubt `lsys.parallel.messages.choice` takes the first.
SOFTMAX = _by_name(
    _softmax("ring", ring.between, _RING, "passes keys and values from rank to rank", alone),
    _softmax("gather", gather.between, _GATHER, "gathers them", alone, collective=True),
    _softmax("ulysses", ring.between, _RING, "exchanges heads for tokens", everyone, ends=1, whole=True),
    _softmax("usp", ring.between, _RING, "is `ulysses` inside nodes and `ring` across", usp.groups, ends=1),
)

_CHAIN = "lsys.parallel.linear.chain"
STATE = _by_name(
    Method("lasp1", chain.lasp1, f"{_CHAIN}:lasp1", "passes states from rank to rank"),
    Method(
        "lasp2",
        lasp2.phases,
        "lsys.parallel.linear.lasp2:exchange",
        "gathers them at once",
        collective=True,
        transitions=True,
    ),
    Method("zeco", chain.zeco, f"{_CHAIN}:zeco", "passes them in blocks"),
    Method(
        "ulysses",
        ulysses.phases,
        "lsys.parallel.linear.ulysses:attention",
        "exchanges heads for tokens",
        groups=everyone,
        ends=1,
        whole=True,
    ),
)


def described(methods: dict[str, Method]) -> str:
    """All of them in one sentence."""
    return ", ".join(f"`{method.name}` {method.summary}" for method in methods.values())
