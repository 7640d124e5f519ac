"""An update that is not finite is not made, alike on all ranks and degrees; and it is told with its parameter and rank."""

import contextlib
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import parity, planting, resuming, states

STEP, STOP = 3, 4
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, no clipping": (1, {"optimizer__clip": 0.0, "optimizer__distributed": False}),
    "own optimizer": (1, {"optimizer__kind": "my_parts.training:lion", "optimizer__distributed": False}),
    "DP2": (2, {}),
    "DP2 overlap bf16": (2, {"train__overlap": True, "train__precision": "bf16"}),
    "DP2 plain bf16": (2, {"optimizer__distributed": False, "train__precision": "bf16"}),
    "TP2 plain": (2, {"parallel__tensor": 2, "optimizer__distributed": False}),
    "CP2 overlap": (2, {"parallel__context": 2, "train__overlap": True}),
    "PP2xVPP2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__recompute": "full"}),
    "TP2xPP2 overlap": (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "train__overlap": True}),
    "CP2xDP2 plain": (4, {"parallel__context": 2, "optimizer__distributed": False}),
}
SLOW = {
    "own optimizer",
    "CP2 overlap",
    "PP2xVPP2",
    "DP2 overlap bf16",
    "DP2 plain bf16",
    "CP2xDP2 plain",
    "TP2xPP2 overlap",
}
# (what is planted, into which of the rank's parameters, whether only the first passes have it)
PLANTS = [(math.nan, 3, False), (math.inf, -2, False), (1e30, 0, False), (math.nan, 1, True)]


def advance(engine: Any, without: int = 0) -> dict[str, Any]:
    """All steps: losses, norms, which updates were made, and what is told of others. Step `without` is left out, but for the schedule."""
    groups, planner = engine.groups, planner_of(engine)
    seen: dict[str, Any] = {"losses": [], "norms": [], "applied": [], "told": ""}
    for step in range(1, STOP + 1):
        if step == without:
            engine.scheduler.step(increment=1)
            seen["losses"].append(math.nan)
            continue
        plan = planner.step(step - 1, groups.data_rank, groups.data_size)
        batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
        seen["losses"].append(engine.forward_backward(batches).mean)
        update = engine.step()
        seen["applied"].append(update.applied)
        seen["norms"].append(update.norm)
        if not update.applied:
            before, hooks = torch.get_rng_state(), hooks_of(engine)
            seen["told"] = engine.find_not_finite(batches)
            assert torch.equal(torch.get_rng_state(), before) and hooks_of(engine) == hooks
    return seen


def hooks_of(engine: Any) -> int:
    modules = [module for chunk in engine.chunks for module in chunk.modules()]
    tensors = [len(p._backward_hooks or ()) for chunk in engine.chunks for p in chunk.parameters()]
    return sum(len(module._forward_hooks) for module in modules) + sum(tensors)


def planner_of(engine: Any) -> Any:
    from lsys.data.plan import Planner

    config = engine.settings
    train, parallel = config.train, config.parallel
    documents: Any = parity.RandomDocuments(config.model.vocab)
    degrees = parallel.context, parallel.tensor, parallel.layout
    return Planner(documents, train.batch_tokens, train.micro_batch_tokens, *degrees)


def held(engine: Any) -> list[torch.Tensor]:
    """Copies of all parameters, of the optimizer's fp32 copies, moments and counts, and of the states of modules."""
    from lsys.model.module_state import persistent_buffers

    with engine.settled_parameters():
        found = [p.detach().clone() for chunk in engine.chunks for p in chunk.parameters()]
    for each in engine.optimizer.chained_optimizers:
        found += [p.detach().clone() for p in each.get_parameters()]
        found += [v.clone() for s in each.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return found + [buffer.clone() for chunk in engine.chunks for _, _, buffer in persistent_buffers(chunk)]


def draws(engine: Any) -> list[float]:
    """Let a layer draw a random number in each forward pass, and add to its own state; the numbers, as they come."""
    drawn: list[float] = []
    mixer = engine.chunks[0].module.decoder.layers[1].self_attention

    def hook(*_: object) -> None:
        drawn.append(float(torch.rand(())))
        mixer.of_heads.steps.add_(1)

    mixer.register_forward_hook(hook)
    return drawn


def skips(rank: int, world_size: int, changes: dict[str, Any], plants: list[Any], stateful: bool = False) -> list[Any]:
    """Of each plant on the last rank, (what was planted, what was seen), and whether all is as if that update had never been tried."""
    from lsys.runtime import install_megatron

    install_megatron()
    found = []
    with states.stateful() if stateful else contextlib.nullcontext():
        with resuming.engine_of(rank, world_size, changes) as engine:
            if stateful:
                draws(engine)
            without, kept = advance(engine, without=STEP), held(engine)
        for value, where, once in plants:
            with resuming.engine_of(rank, world_size, changes) as engine:
                options = dict(step=STEP, rank=world_size - 1, value=value)
                if once in ("output", "backward"):
                    name = planting.plant_output(engine, module=where, backward=once == "backward", **options)
                else:
                    name = planting.plant(engine, parameter=where, once=once, **options)
                drawn = draws(engine) if stateful else []
                seen = advance(engine)
                seen["drawn"] = drawn
                same = all(torch.equal(a, b) for a, b in zip(held(engine), kept, strict=True))
                seen["same"] = same and [x for i, x in enumerate(seen["losses"]) if i != STEP - 1] == [
                    x for i, x in enumerate(without["losses"]) if i != STEP - 1
                ]
                found.append((name, seen))
    return found


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_an_update_that_is_not_finite_is_as_if_never_tried(gloo: Any, case: str) -> None:
    ranks, changes = CASES[case]
    everywhere = gloo(ranks, skips, changes, PLANTS)
    last = ranks - 1
    for plant, (value, _, once) in enumerate(PLANTS):
        name = everywhere[last][plant][0]
        for rank in range(ranks):
            _, seen = everywhere[rank][plant]
            assert seen["applied"] == [step != STEP for step in range(1, STOP + 1)], (rank, value)
            assert seen["same"], (rank, value)
            assert not math.isfinite(seen["norms"][STEP - 1]) and all(map(math.isfinite, seen["losses"]))
            assert str(seen["norms"]) == str(everywhere[0][plant][1]["norms"])  # equal bits, and nan
            told = f"the gradient of {name} is not finite on rank {last}"
            if once:
                assert seen["told"].startswith(f"the gradient of {name} was not finite on rank")
                assert "no rank's own is, as the step's micro-batches were run once more" in seen["told"]
            elif value == 1e30:
                assert seen["told"].startswith("every gradient is finite and their norm is not; the largest, ")
                assert f" is of {name} on rank" in seen["told"]
            else:
                assert seen["told"] == told


def test_a_loss_that_is_not_finite_is_told_by_module_and_rank(gloo: Any) -> None:
    """One that arises behind the last attention; and, where no kernel looks, far before: on that rank first, whoever hears of it later."""
    everywhere = gloo(
        2,
        skips,
        {"parallel__tensor": 2},
        [(math.nan, "3.mlp.linear_fc1", "output"), (math.inf, "final_layernorm", "output")],
    )
    for rank in range(2):
        for plant in range(2):
            name, seen = everywhere[1][plant][0], everywhere[rank][plant][1]
            assert seen["told"] == f"the output of {name} is not finite on rank 1"
            assert (
                seen["applied"] == [True, True, False, True] and seen["same"] and not math.isfinite(seen["losses"][2])
            )
    first, second = gloo(2, skips, {"parallel__pipeline": 2}, [(math.nan, "3.mlp.linear_fc1", "output")])
    assert first[0][1]["told"] == f"the output of {second[0][0]} is not finite on rank 1"
    assert second[0][0] == "decoder.layers.3.mlp.linear_fc1"  # of all stages


def test_of_gradients_the_first_in_the_order_of_the_backward_pass_is_told(gloo: Any) -> None:
    """All layers before it have the NaN as well."""
    ((_, seen),) = gloo(1, skips, {}, [(math.nan, "2.self_attention.out_proj", "backward")])[0]
    assert seen["told"] == "the gradient of decoder.layers.2.self_attention.out_proj.weight is not finite on rank 0"


def test_random_numbers_and_states_of_modules_are_as_without_the_step(gloo: Any) -> None:
    """A state that forward passes add to is put back; the passes that look for the NaN draw the numbers that the step drew."""
    for ((_, seen),) in gloo(2, skips, {"parallel__tensor": 2}, [(math.nan, 3, False)], True):
        assert seen["same"] and "is not finite on rank 1" in seen["told"]
        passes = len(seen["drawn"]) // (STOP + 1)
        step = slice((STEP - 1) * passes, STEP * passes)
        assert seen["drawn"][STEP * passes : (STEP + 1) * passes] == seen["drawn"][step]
        assert len(set(seen["drawn"])) == STOP * passes > 0


def unlike(rank: int, world_size: int, changes: dict[str, Any], where: str) -> list[Any]:
    """Whether ranks skip alike what one of them has alone: a copy that the norm leaves out, or a replica's flipped bit."""
    from lsys.runtime import install_megatron

    install_megatron()
    with resuming.engine_of(rank, world_size, changes) as engine:
        for chunk in engine.chunks:
            for parameter in chunk.module.parameters():
                if where == "copy":  # whole on each tensor rank, and summed over none
                    parameter.sequence_parallel = False
        groups = engine.groups
        plan = planner_of(engine).step(0, groups.data_rank, groups.data_size)
        engine.forward_backward(plan.on_rank(groups.context_rank, groups.device, groups.context))
        if where == "loss":
            engine._losses = replace(engine._losses, entropy=math.inf)
        elif rank == 1:
            (chunk,) = engine.chunks
            chunk.module.decoder.layers[0].input_layernorm.weight.main_grad[0] = math.nan
        return [engine.step().applied, all(p.isfinite().all() for chunk in engine.chunks for p in chunk.parameters())]


@pytest.mark.parametrize(
    "where, changes", [("copy", {"parallel__tensor": 2}), ("replica", {"optimizer__distributed": False})]
)
def test_what_one_rank_has_alone_all_skip(gloo: Any, where: str, changes: dict[str, Any]) -> None:
    assert gloo(2, unlike, changes, where) == [[False, True]] * 2


def test_a_loss_that_is_not_finite_counts_by_itself(gloo: Any) -> None:
    assert gloo(1, unlike, {}, "loss") == [[False, True]]


def cost(rank: int, world_size: int, changes: dict[str, Any]) -> tuple[dict[Any, int], int, int]:
    """Of an update: messages that Megatron's own does not send, how many gradients are read for the norm, and how many there are."""
    from lsys.runtime import install_megatron

    install_megatron()
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from lsys.parallel.ledger import record
    from lsys.train import finite

    class Reads(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            if not func.is_view:
                self.elements += sum(t.numel() for t in given if t.untyped_storage().data_ptr() in buffers)
            return func(*args, **(kwargs or {}))

    with resuming.engine_of(rank, world_size, changes) as engine:
        groups, ledgers = engine.groups, []
        plan = planner_of(engine).step(0, groups.data_rank, groups.data_size)
        for update in (engine.optimizer.step, engine.step):
            engine.forward_backward(plan.on_rank(groups.context_rank, groups.device, groups.context))
            with record() as ledger:
                update()
            ledgers.append(Counter((e.axis, e.operation.kind, e.operation.bytes) for e in ledger.events))
        held = [p.grad for o in engine.optimizer.chained_optimizers for p in o.get_parameters() if p.grad is not None]
        buffers = {gradient.untyped_storage().data_ptr() for gradient in held}
        with Reads() as reads:
            finite.gradient_norm(engine.optimizer)
        assert not ledgers[0] - ledgers[1]
        return dict(ledgers[1] - ledgers[0]), reads.elements, sum(gradient.numel() for gradient in held)


@pytest.mark.parametrize(
    "changes, sent",
    [
        ({}, {}),
        ({"parallel__tensor": 2, "optimizer__distributed": False}, {}),
        ({"optimizer__distributed": False}, {("data", "all_reduce", 8): 1}),
    ],
)
def test_the_check_reads_each_gradient_once_and_sends_8_bytes_at_most(
    gloo: Any, changes: dict[str, Any], sent: Any
) -> None:
    for more, read, count in gloo(2, cost, changes):
        assert more == sent and read == count > 0
