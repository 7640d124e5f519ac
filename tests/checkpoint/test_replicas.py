"""A bit that flips in what several ranks hold alike: rank and tensor are named, and no checkpoint is written from it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import resuming

LAYER = "decoder.layers.1"
MATRIX, NORM = f"{LAYER}.mlp.linear_fc2.weight", f"{LAYER}.pre_mlp_layernorm.weight"
PLAIN: dict[str, Any] = {"optimizer__distributed": False}


def flip(tensor: torch.Tensor) -> None:
    """One bit of the middle number."""
    words = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32}[tensor.itemsize])
    words[len(words) // 2] ^= 1 << 3


def place(engine: Any, what: str, ending: str) -> torch.Tensor:
    """A parameter by the end of its name, or what the plain optimizer keeps for it."""
    parameters = {name: p for chunk in engine.chunks for name, p in chunk.module.named_parameters()}
    (parameter,) = [p for name, p in parameters.items() if name.endswith(ending)]
    if what == "parameter":
        return parameter
    master = getattr(parameter, "main_param", parameter)
    for each in engine.optimizer.chained_optimizers:
        if master in each.optimizer.state:
            return master if what == "master" else each.optimizer.state[master][what]
    raise KeyError(what)


def others_part(engine: Any) -> torch.Tensor:
    """A parameter that the last rank updates, for the first: the last one of a bucket."""
    (buffer, *_) = engine.chunks[0].buffers
    return max(buffer.param_index_map, key=lambda parameter: buffer.param_index_map[parameter][0])


def saves(
    rank: int, world_size: int, folder: Path, changes: dict[str, Any], at: int | None, what: str, name: str
) -> Any:
    """What saving says where rank `at` has flipped a bit after two steps; if it says nothing, bytes that comparing the model takes."""
    from lsys.checkpoint import Checkpoints
    from lsys.checkpoint.replicas import ReplicaError, require_equal
    from lsys.parallel.ledger import record

    with resuming.engine_of(rank, world_size, changes) as engine:
        resuming.advance(engine, 0, 2, resuming.Seen())
        with engine.settled_parameters():
            if rank == at:
                flip(place(engine, what, name))
            try:
                Checkpoints(folder, 1).save(engine, resuming.cursor_of(engine, 2))
            except ReplicaError as error:
                return str(error)
            state = {key: each for key, each in engine.state(loading=False).items() if key != "optimizer"}
            with record() as ledger:
                require_equal(state, engine.groups.collection.pp.rank())
            return [event.operation.bytes for event in ledger.events if event.operation.kind == "all_gather"][:3]


CASES: dict[str, tuple[int, dict[str, Any], int, str, str, str]] = {
    "parameter over data": (4, PLAIN, 2, "parameter", MATRIX, f"rank 2 differs from ranks 0, 1, 3 in {MATRIX}"),
    "moment over data": (
        3,
        PLAIN,
        0,
        "exp_avg",
        MATRIX,
        f"rank 0 differs from ranks 1, 2 in optimizer.state.exp_avg.{MATRIX}.",
    ),
    "master over context": (
        2,
        PLAIN | {"parallel__context": 2, "train__precision": "bf16"},
        1,
        "master",
        MATRIX,
        f"ranks 0, 1 hold different optimizer.state.fp32_param.{MATRIX}.",
    ),
    "norm over tensor": (2, {"parallel__tensor": 2}, 1, "parameter", NORM, f"ranks 0, 1 hold different {NORM}"),
}


@pytest.mark.fault("flipped bit in memory")
@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_named_and_nothing_is_written(gloo: Any, tmp_path: Path, case: str) -> None:
    ranks, changes, at, what, name, told = CASES[case]
    for text in gloo(ranks, saves, tmp_path, changes, at, what, name):
        assert f"ranks that have to hold the same do not: {told}" in text and "No checkpoint is written from it" in text
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (4, {"parallel__tensor": 2, "train__precision": "bf16"}),
        (4, PLAIN | {"parallel__tensor": 2, "parallel__context": 2, "model__pattern": "MDGS"}),
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__overlap": True}),
    ],
)
def test_ranks_that_computed_alike_save(gloo: Any, tmp_path: Path, ranks: int, changes: dict[str, Any]) -> None:
    found = gloo(ranks, saves, tmp_path, changes, None, "", "")
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000002"]
    for each in found:
        counts, identities, *digests = each
        assert counts == 8 and 8 * 10 < identities < 8 * 80
        assert not digests if "parallel__pipeline" in changes else 0 < digests[0] <= identities


def before_update(rank: int, world_size: int, changes: dict[str, Any], at: int) -> tuple[str, str]:
    """What the comparisons before and after an update say of a bit that a rank has flipped in its copy of another's part."""
    from support import parity

    from lsys.checkpoint.replicas import ReplicaError
    from lsys.checkpoint.state import require_equal_models, state_to_save
    from lsys.data.plan import Planner

    said = []
    with resuming.engine_of(rank, world_size, changes) as engine:
        resuming.advance(engine, 0, 1, resuming.Seen())
        train, documents = engine.settings.train, parity.RandomDocuments(engine.settings.model.vocab)
        planner = Planner(documents, train.batch_tokens, train.micro_batch_tokens, 1, 1, "zigzag")  # type: ignore[arg-type]
        batches = planner.step(1, rank, world_size).on_rank(0, engine.groups.device, engine.groups.context)
        engine.forward_backward(batches)
        if rank == at:
            flip(others_part(engine))
        for look in (lambda: require_equal_models(engine), lambda: state_to_save(engine)):
            try:
                look()
                said.append("equal")
            except ReplicaError as error:
                said.append(str(error))
            if len(said) == 1:
                engine.step()
                with engine.settled_parameters():
                    pass
    return said[0], said[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_with_the_distributed_optimizer_it_shows_before_the_update_only(gloo: Any, overlap: bool) -> None:
    for before, after in gloo(3, before_update, {"train__overlap": overlap, "train__batch_tokens": 3 * 97}, 0):
        assert "do not: rank 0 differs from ranks 1, 2 in " in before
        assert after == "equal"


def trains(rank: int, world_size: int, folder: Path, flipped: int) -> str:
    """How a run of four steps ends that saves after the second and the last, where rank 0 flips a bit in the forward pass of a step."""
    import contextlib
    import io
    from unittest import mock

    from lsys.runtime import install_megatron

    install_megatron()
    from support import parity
    from support.delays import StubData

    from lsys.checkpoint.replicas import ReplicaError
    from lsys.config.schema import Checkpoint, Metrics
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine
    from lsys.train.run import Run

    original = Engine.forward_backward

    def forward_backward(self: Any, batches: Any, **options: Any) -> Any:
        done = original(self, batches, **options)
        if rank == 0 and self.scheduler.num_steps + 1 == flipped:
            flip(others_part(self))
        return done

    config = parity.settings(train__steps=4, train__folder=folder, train__validate_tokens=0)
    config = config.model_copy(update={"metrics": Metrics(waterfall_every=0), "checkpoint": Checkpoint(every=2)})
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("lsys.train.data.open_data", StubData))
        stack.enter_context(mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None))
        stack.enter_context(mock.patch.object(Engine, "forward_backward", forward_backward))
        groups = stack.enter_context(process_groups(config.parallel, Launch(rank=rank, world_size=world_size)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            Run(config, groups).train()
        except ReplicaError as error:
            return str(error)
    return "done"


@pytest.mark.parametrize("flipped, left", [(2, []), (4, ["step-00000002"]), (3, ["step-00000002", "step-00000004"])])
def test_a_run_compares_what_a_step_used_that_is_saved(
    gloo: Any, tmp_path: Path, flipped: int, left: list[str]
) -> None:
    """In the third step it was used too, but the gather has made all alike before the next save."""
    for said in gloo(2, trains, tmp_path, flipped):
        assert said == "done" if flipped == 3 else "ranks 0, 1 hold different" in said
    assert sorted(each.name for each in tmp_path.glob("checkpoints/*")) == left


def test_the_digest_of_a_tensor_changes_with_every_bit() -> None:
    from lsys.checkpoint.replicas import digest

    for tensor in (torch.randn(5, 3), torch.randn(4, 2).bfloat16(), torch.arange(6), torch.tensor([True, False])):
        before = digest(tensor)
        words = tensor.view(-1).view(torch.uint8)
        for place in range(len(words)):
            for bit in range(8 if tensor.dtype != torch.bool else 1):
                words[place] ^= 1 << bit
                assert digest(tensor) != before
                words[place] ^= 1 << bit
        assert digest(tensor) == before
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))
    whole = torch.randn(9)
    assert digest(whole[1:]) == digest(whole[1:].clone())  # words that begin in the middle of the memory's
    assert digest(torch.ones(3, 4).T) == digest(torch.ones(4, 3))
