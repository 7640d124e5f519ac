"""What the engine guards against in Megatron: stale parameters under overlap, layers that vanish."""

import math
from typing import Any

import pytest
import torch
from support import parity


def losses_after_a_step(rank: int, world_size: int, overlap: bool, settled: bool) -> tuple[float, float]:
    """A training step, then the loss of the next batch without gradients; and the sum of all parameters."""
    from contextlib import nullcontext

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    settings = parity.settings(train__overlap=overlap)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        engine = Engine(settings, groups)
        planner: Any = Planner(parity.RandomDocuments(61), 4 * 97, 97)  # type: ignore[arg-type]
        for step in range(2):
            engine.forward_backward(planner.step(step, groups.data_rank, groups.data_size).on_rank(0, groups.device))
            engine.step()
        with engine.settled_parameters() if settled else nullcontext():
            total = sum(float(p.detach().double().sum()) for chunk in engine.chunks for p in chunk.parameters())
            batches = planner.step(2, groups.data_rank, groups.data_size).on_rank(0, groups.device)
            loss = engine.forward_backward(batches, forward_only=True).mean if settled else 0.0
        return total, loss


def test_parameters_are_settled_before_they_are_read(gloo: Any) -> None:
    expected = gloo(2, losses_after_a_step, False, True)
    assert gloo(2, losses_after_a_step, True, True) == expected
    stale = gloo(2, losses_after_a_step, True, False)
    assert stale[0][0] != expected[0][0]  # the measure is needed: without it, parameters are those of before the step


def saved_without_gradients(rank: int, world_size: int, changes: dict[str, Any]) -> tuple[int, int]:
    """Tensors that autograd saves in a step without gradients, and in one with them."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    settings = parity.settings(**changes)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        engine, parallel, saved = Engine(settings, groups), settings.parallel, []
        stream: Any = parity.RandomDocuments(61)
        planner = Planner(stream, 4 * 97, 97, parallel.context, parallel.tensor, parallel.layout)
        plan = planner.step(0, groups.data_rank, groups.data_size)
        batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
        for forward_only in (True, False):
            count = [0]

            def note(tensor: torch.Tensor, count: list[int] = count) -> torch.Tensor:
                count[0] += 1
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                engine.forward_backward(batches, forward_only=forward_only)
            saved.append(count[0])
    return saved[0], saved[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__context": 2},
        {"parallel__tensor": 2},
        {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__recompute": "full"},
    ],
    ids=str,
)
def test_a_validation_records_no_graph(gloo: Any, changes: dict[str, Any]) -> None:
    changes = changes | {"model__pattern": "SLD", "model__layers": 4}
    for without, with_gradients in gloo(2, saved_without_gradients, changes):
        assert without == 0 and with_gradients > 10


def what_outlives_its_engine(rank: int, world_size: int, changes: dict[str, Any]) -> list[str]:
    """Parameters that a dropped engine leaves in memory after two steps."""
    import gc
    import weakref

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    settings = parity.settings(**changes)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        engine = Engine(settings, groups)
        planner: Any = Planner(parity.RandomDocuments(61), 4 * 97, 97)  # type: ignore[arg-type]
        for step in range(2):
            engine.forward_backward(planner.step(step, groups.data_rank, groups.data_size).on_rank(0, groups.device))
            engine.step()
        held = {name: weakref.ref(tensor) for chunk in engine.chunks for name, tensor in chunk.named_parameters()}
    del engine, groups
    gc.collect()
    return [name for name, tensor in held.items() if tensor() is not None]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__overlap": True},
        {"train__precision": "bf16"},
        {"optimizer__distributed": False},
        {"parallel__pipeline": 2},
    ],
    ids=str,
)
def test_a_dropped_engine_is_freed(gloo: Any, changes: dict[str, Any]) -> None:
    """Megatron's hooks and autograd's nodes hold each other, which Python's collector cannot always see."""
    assert gloo(2, what_outlives_its_engine, changes) == [[], []]


def build_with_a_layer_less(rank: int, world_size: int) -> str:
    from unittest import mock

    from lsys.runtime import install_megatron

    install_megatron()
    import lsys.model.layers as layers
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine
    from lsys.train.errors import RunError

    settings = parity.settings(parallel__pipeline=2)
    count = layers.get_num_layers_to_build
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        with mock.patch.object(layers, "get_num_layers_to_build", lambda *a: count(*a) - (rank == 1)):
            try:
                Engine(settings, groups)
            except RunError as error:
                return str(error)
    return "built"


def test_a_dropped_layer_is_noticed(gloo: Any) -> None:
    for message in gloo(2, build_with_a_layer_less):
        assert message.startswith("3 layers were built for model.layers 4")


def initial_parameters(rank: int, world_size: int, changes: dict[str, Any]) -> list[tuple]:
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.model.parameters import pieces
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    settings = parity.settings(**changes)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        engine = Engine(settings, groups)
        return [(p.key, p.slices, p.data.clone()) for chunk in engine.chunks for p in pieces(chunk.module)]


@pytest.mark.parametrize(
    "changes", [{"parallel__tensor": 2}, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}]
)
def test_initial_weights_are_the_same_for_all_degrees(gloo: Any, changes: dict[str, Any]) -> None:
    whole: dict[str, list[Any]] = {}
    for key, place, data in gloo(1, initial_parameters, {})[0]:  # SwiGLU's weight is two pieces also on one rank
        whole.setdefault(key, []).append((place, data))
    for pieces in gloo(2, initial_parameters, changes):
        for key, place, data in pieces:
            start, (outer, values) = (
                place[0].start,
                max((w for w in whole[key] if w[0][0].start <= place[0].start), key=lambda w: w[0][0].start),
            )
            inner = (slice(start - outer[0].start, start - outer[0].start + len(data)), *place[1:])
            assert torch.equal(values[inner], data), key


INIT_STD, LAYERS = 0.03, 9
PATTERN = "SLRGMDNKS"
WRITES = INIT_STD / math.sqrt(2 * LAYERS)  # into the residual stream (GPT-2)


@pytest.fixture(scope="module")
def initial(gloo: Any) -> dict[str, torch.Tensor]:
    """The initial parameters of an untied model with every mixer."""
    linear = {"heads": 8, "key_heads": 4, "key_dim": 16, "head_dim": 16}
    sizes: dict[str, Any] = dict(model__hidden=64, model__ffn=96, model__layers=LAYERS, model__linear=linear)
    (found,) = gloo(
        1, initial_parameters, sizes | dict(model__pattern=PATTERN, model__init_std=INIT_STD, model__tied=False)
    )
    whole: dict[str, list[torch.Tensor]] = {}
    for key, _, data in found:
        whole.setdefault(key, []).append(data)
    return {key: torch.cat(parts) for key, parts in whole.items()}


def test_initial_weights_have_their_standard_deviations(initial: dict[str, torch.Tensor]) -> None:
    """Normal, with one standard deviation for what reads the residual stream and one for what writes to it; of embeddings the first."""
    seen = set()
    for key, weight in initial.items():
        if weight.dim() < 2 or key.endswith("conv.weight"):
            continue
        writes = key.endswith(("out_proj.weight", "linear_fc2.weight"))
        wanted, count = WRITES if writes else INIT_STD, weight.numel()
        # A sample's standard deviation is known to 1 in sqrt(2 n), its mean to 1 in sqrt(n).
        assert float(weight.std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * count)), key
        assert abs(float(weight.mean())) < 5 * wanted / math.sqrt(count), key
        kurtosis = float((weight / weight.std()).pow(4).mean())
        assert kurtosis == pytest.approx(3.0, abs=5 * math.sqrt(24 / count)), key  # normal; a uniform one has 1.8
        seen.add(key.split(".")[-2] + "." + key.split(".")[-1])
    assert {"word_embeddings.weight", "output_layer.weight", "in_proj.weight", "out_proj.weight"} <= seen
    assert {"linear_fc1.weight", "linear_fc2.weight", "decay_in.weight", "decay_out.weight", "gate_out.weight"} <= seen


def test_initial_norms_biases_and_decays(initial: dict[str, torch.Tensor]) -> None:
    """Norms and skips are 1, biases 0; convolutions uniform within 1 / sqrt(width); rates uniform in 1..16 and steps log-uniform in
    0.001..0.1 (Mamba-2: Dao & Gu, 2024)."""
    others = {key: value for key, value in initial.items() if value.dim() < 2 or key.endswith("conv.weight")}
    steps, counts = [], {"ones": 0, "zeros": 0, "conv": 0, "A_log": 0}
    for key, value in others.items():
        if key.endswith("A_log"):
            counts["A_log"] += 1
            assert (value >= 0).all() and (value <= math.log(16)).all() and 0.5 < float(value.exp().mean()) - 3 < 11
        elif key.endswith("dt_bias"):
            steps.append(torch.nn.functional.softplus(value.double()).log10())
        elif key.endswith("conv.weight"):
            bound, count = value.shape[1] ** -0.5, value.numel()
            counts["conv"] += 1
            assert value.abs().max() <= bound and value.abs().max() > 0.98 * bound, key
            assert float(value.std()) == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(2 * count)), key
        elif key.endswith("bias"):
            counts["zeros"] += 1
            assert (value == 0).all(), key
        else:
            counts["ones"] += 1
            assert (value == 1).all(), key
    assert min(counts.values()) > 0, counts
    every = torch.cat(steps)
    assert every.min() >= -3.001 and every.max() <= -0.999 and len(every) > 100
    assert float(every.mean()) == pytest.approx(-2, abs=5 * 2 / math.sqrt(12 * len(every)))


def rates(rank: int, world_size: int, changes: dict[str, Any]) -> list[float]:
    """The learning rate of each step."""
    from support import resuming

    with resuming.engine_of(rank, world_size, changes) as engine:
        found = []
        for _ in range(20):
            found.append(engine.learning_rate)
            engine.scheduler.step(increment=1)
        return found


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_learning_rate_is_the_schedules_formula(gloo: Any, schedule: str) -> None:
    """Linear warm-up over 4 of 20 steps, to the peak; then cosine (Loshchilov & Hutter, 2017), or constant with a linear end of 5 steps (Hu et al., 2024)."""
    peak, least, warm, steps, end = 0.01, 0.001, 4, 20, 5
    changes = dict(schedule=schedule, lr=peak, min_lr=least, warmup_steps=warm, decay_steps=end)
    if schedule == "constant":
        changes["min_lr"] = 0.0
    (found,) = gloo(1, rates, {f"optimizer__{key}": value for key, value in changes.items()} | {"train__steps": steps})

    def formula(done: int) -> float:
        if done < warm:
            return peak * (done + 1) / warm
        if schedule == "cosine":
            share = (1 + math.cos(math.pi * (done - warm) / (steps - warm))) / 2
        else:
            share = 1.0 if schedule == "constant" else min(1.0, (steps - done) / end)
        return least + share * (peak - least)

    assert found == pytest.approx([formula(done) for done in range(steps)], rel=1e-12)


def rate_after(rank: int, world_size: int, changes: dict[str, Any], steps: int) -> float:
    """The learning rate of the first step from a checkpoint that holds a schedule of so many steps."""
    from support import resuming

    with resuming.engine_of(rank, world_size, changes) as engine:
        held = engine.scheduler.state_dict() | {"num_steps": steps}
        engine.scheduler.num_steps = 0  # as `megatron_state.put` has it
        engine.scheduler.load_state_dict(held)
        return engine.learning_rate


@pytest.mark.parametrize(("steps", "wanted"), [(2, 0.0075), (3, 0.01), (4, 0.01), (12, 0.005)])
def test_an_older_checkpoint_goes_on_with_the_next_rate(gloo: Any, steps: int, wanted: float) -> None:
    """Of a warm-up of 4 steps and a cosine to 20: within it the next step's, 1 / 4 more than it would have been; behind it as ever."""
    changes: dict[str, Any] = dict(schedule="cosine", lr=0.01, warmup_steps=4, min_lr=0.0)
    changes = {f"optimizer__{key}": value for key, value in changes.items()} | {"train__steps": 20}
    assert gloo(1, rate_after, changes, steps) == [pytest.approx(wanted, rel=1e-12)]
