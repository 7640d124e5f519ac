"""An optimizer of one's own that checkpoints would not hold is refused before a run's process groups start; the others go on bit by bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import optimizers, parity, resuming
from support.comparing import largest

from lsys.config.messages import FilesError

OWN: dict[str, Any] = {"optimizer__distributed": False, "optimizer__lr": 1e-3}


def options(name: str) -> dict[str, Any]:
    return OWN | {"optimizer__kind": f"support.optimizers:{name}"}


@pytest.fixture(scope="module")
def trial() -> Callable[[dict[str, Any]], None]:
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.train.own_trial import require_optimizer

    return lambda changes: require_optimizer(parity.settings(**changes).optimizer)


ELSEWHERE = "which a checkpoint does not keep; keep it in `state`, as a tensor of the parameter's shape"

WRONG = {
    "fails": "(groups, options) raised OSError: no",
    "nothing": "gives a NoneType; it has to be a torch.optim.Optimizer",
    "bare": "has no param_groups and state; its __init__ has to call super().__init__(groups, defaults)",
    "odd": "has other groups than it was given",
    "regroups": "has other groups than it was given",
    "third_raises": "the step of support.optimizers:third_raises raised OSError: no table",
    "second_raises": "a second time, support.optimizers:second_raises(groups, options) raised OSError: no",
    "row": "its state 'row' is torch.float32 [2] for a parameter torch.float32 [2, 3]; checkpoints keep",
    "none": "its state 'momentum' is None for a parameter torch.float32 [2, 3]; checkpoints keep",
    "named_s": "its state 's' has a name that checkpoints cannot keep; call it otherwise",
    "named_ste": "its state 'ste' has a name",
    "named_p": "its state 'p' has a name",
    "named_empty": "its state '' has a name",
    "named_0": "its state 0 has a name",
    "named_fp32_param": "its state 'fp32_param' has a name",
    "entry": "its `state` has an entry 'shared', which is no parameter",
    "shaped_step": "its state 'step' is torch.float32 [2, 3]; checkpoints keep it as one number, equal for all",
    "numpy_step": "its state 'step' is np.float64(1.0); checkpoints keep it as one number",
    "other_step": "its state 'step' is not equal for all parameters",
    "some_step": "its state 'step' is not equal for all parameters",
    "late": "its states 'slow' come or go in step 5; a resumed run has those of the first step",
    "gone": "its states 'momentum' come or go in step 2",
    "counts_in_groups": f"its steps change 'k' of its groups, {ELSEWHERE}",
    "own_decay": f"its steps change 'weight_decay' of its groups, {ELSEWHERE}",
    "counts": f"its steps change its attribute 'count', {ELSEWHERE}",
    "counts_inside": f"its steps change its attribute 'kept', {ELSEWHERE}",
    "counts_in_a_deque": f"its steps change its attribute 'kept', {ELSEWHERE}",
    "counts_in_an_array": f"its steps change its attribute 'kept', {ELSEWHERE}",
    "counts_in_the_module": "made anew with the states of another, takes another step: it keeps more than `state`",
    "own_random": "made anew with the states of another, takes another step",
    "inverse_rate": "made anew, does not take the states of another: ZeroDivisionError",
    "holds_enum": "its groups hold 'mode': <Mode.FAST: 1>; checkpoints keep them",
    "holds_numpy": "its groups hold 'mode': np.float64(0.5); checkpoints keep them",
    "holds_function": "its groups hold 'mode': <function <lambda>",
}


@pytest.mark.parametrize("name", WRONG)
def test_an_optimizer_that_does_not_do(trial: Any, name: str) -> None:
    """Told by the rank where it is found: another node may have another copy."""
    with pytest.raises(FilesError) as caught:
        trial(options(name))
    assert str(caught.value).startswith("optimizer.kind: ") and WRONG[name] in str(caught.value)
    assert "\n" not in str(caught.value) and not dist.is_initialized()


@pytest.mark.parametrize("name", ["whole_norm", "world_norm", "random"])
def test_an_optimizer_that_does(trial: Any, name: str) -> None:
    trial(options(name))


def _torchs(name: str) -> Any:
    more = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    return lambda groups, options: getattr(torch.optim, name)(groups, **more)


TORCHS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "RAdam", "RMSprop", "Rprop", "SGD")
for each in TORCHS:
    setattr(optimizers, f"torchs_{each}", _torchs(each))


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_optimizers_do_or_have_states_of_other_shapes(trial: Any, name: str) -> None:
    trial(options(f"torchs_{name}"))


# ---- the trial's world


def listening() -> set[str]:
    """Sockets of this process that listen."""
    mine = {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in open(f"/proc/self/net/{kind}").readlines()[1:]]
    return {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"} & mine


SEEN: list[Any] = []


def watching(groups: list[dict[str, Any]], options: Any) -> torch.optim.SGD:
    from megatron.core import parallel_state

    total, parts = torch.ones(2), [torch.zeros(2)]
    dist.all_reduce(total)
    dist.all_gather(parts, total)
    sizes = [parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_context_parallel_world_size()]
    SEEN.append((dist.get_world_size(), *sizes, total.tolist(), parts[0].tolist(), listening(), [*groups[0]]))
    return torch.optim.SGD(groups)


def test_a_trial_is_one_rank_without_a_network_and_leaves_nothing(trial: Any) -> None:
    """A run's own groups start afterwards."""
    from lsys.config.schema import Parallel
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    torch.manual_seed(99)
    before, state = listening(), torch.get_rng_state()
    trial(OWN | {"optimizer__kind": f"{__name__}:watching"})
    assert [each[:5] for each in SEEN] == [(1, 1, 1, [1.0, 1.0], [1.0, 1.0])] * 2
    assert all(each[5] == before for each in SEEN) and not dist.is_initialized()
    assert torch.equal(torch.get_rng_state(), state)
    with process_groups(Parallel(), Launch()) as groups:
        assert dist.get_backend() == "gloo" and groups.data_size == 1
        assert listening() - before  # as it is seen, where there is one
    assert not dist.is_initialized()


def groups_of_a_run(rank: int, world_size: int) -> list[list[str]]:
    with resuming.engine_of(rank, world_size, OWN | {"optimizer__kind": "support.optimizers:plain"}) as engine:
        return [sorted({*group}) for group in engine.optimizer.param_groups]


def test_a_trials_groups_are_as_a_runs(gloo: Any, trial: Any) -> None:
    from lsys.train.own_trial import Trial

    one = Trial(parity.settings(**OWN, optimizer__kind="support.optimizers:plain").optimizer)
    assert gloo(1, groups_of_a_run)[0] == [sorted({*group}) for group in one.optimizer.param_groups]


# ---- in a run


def outcome(rank: int, world_size: int, changes: dict[str, Any]) -> Any:
    return parity.train(rank, world_size, changes).__dict__


def test_norms_of_whole_matrices_are_those_of_one_process(gloo: Any) -> None:
    one, two = (
        [parity.Outcome(**each) for each in gloo(ranks, outcome, options("whole_norm") | more)]
        for ranks, more in ((1, {}), (2, {"parallel__tensor": 2}))
    )
    found = parity.difference(one, two)
    assert largest(found.values()) <= 1e-5, found


def run(rank: int, world_size: int, changes: dict[str, Any], folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    return resuming.run(rank, world_size, changes, folder, **more).__dict__


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, options("whole_norm") | {"parallel__tensor": 2}),
        (2, options("world_norm") | {"train__precision": "bf16"}),
        (1, {"optimizer__schedule": "support.optimizers:numpy_rate"}),
        (1, {"optimizer__schedule": "support.optimizers:short_rate", "optimizer__distributed": False}),
    ],
)
def test_a_resumed_run_is_bitwise_the_straight_one(
    gloo: Any, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    straight = gloo(ranks, run, changes, tmp_path, dict(stop=4, save=(2,)))
    resumed = gloo(ranks, run, changes, tmp_path, dict(stop=4, load="step-00000002"))
    for one, two in zip(straight, resumed, strict=True):
        assert two["losses"] == one["losses"][2:] and two["rates"] == one["rates"][2:]
        for (_, _, _, a), (_, _, _, b) in zip(one["pieces"], two["pieces"], strict=True):
            assert torch.equal(a, b)


def test_numpys_numbers_are_pythons(gloo: Any) -> None:
    (numpys,), (pythons,) = (
        gloo(1, outcome, {"optimizer__schedule": f"support.optimizers:{name}"})
        for name in ("numpy_rate", "python_rate")
    )
    assert numpys["losses"] == pythons["losses"]


def refused(rank: int, world_size: int, changes: dict[str, Any], folder: Path, more: dict[str, Any]) -> list[Any]:
    from lsys.checkpoint import CheckpointError

    try:
        resuming.run(rank, world_size, changes, folder, **more)
    except (FilesError, CheckpointError) as error:
        return [type(error).__name__, str(error)]
    return ["none"]


def test_states_that_a_first_step_does_not_make_are_not_lost(gloo: Any, tmp_path: Path) -> None:
    """Where no trial could see it, and where the optimizer of this path has become another."""
    assert gloo(1, refused, options("late"), tmp_path, dict(stop=5, save=(5,))) == [["none"]]
    ((kind, text),) = gloo(1, refused, options("late"), tmp_path, dict(stop=5, load="step-00000005"))
    assert kind == "CheckpointError" and "its optimizer states slow would be lost: the optimizer of this run" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (options("fails"), "optimizer.kind: support.optimizers:fails(groups, options) raised OSError: no"),
        (
            {"optimizer__schedule": "support.optimizers:negative_rate"},
            "optimizer.schedule: support.optimizers:negative_rate(0) is -1.0; a factor of optimizer.lr is a number of 0 or",
        ),
    ],
)
def test_what_fails_on_a_rank_of_a_run_is_told_there(gloo: Any, tmp_path: Path, changes: Any, said: str) -> None:
    ((kind, text),) = gloo(1, refused, changes, tmp_path, dict(stop=1))
    assert kind == "FilesError" and said in text
