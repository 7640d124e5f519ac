"""Real runs of a tiny model with delays planted in one place, and what the waterfall says of each step."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

from support import parity

STEPS = 7
REDUCE_SCATTERS = (
    "_reduce_scatter_base",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single",  # and torch's new names
    "reduce_scatter_single_coalesced",
)


class Now:
    """An executor that does nothing ahead: work is done when its result is asked for, so that none of it is hidden."""

    def __init__(self, threads: int) -> None:
        pass

    def __enter__(self) -> "Now":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any) -> Any:
        return SimpleNamespace(result=lambda: work(*args))


class StubData:
    """Stands in for `lsys.train.data.RunData`: the same few steps of random documents, again and again."""

    validation_steps, bigram_entropy, corpora, identity = 0, None, (), None

    def __init__(self, settings: Any, groups: Any, corpora: Any = ()) -> None:
        from lsys.data.plan import Planner

        train, parallel = settings.train, settings.parallel
        degrees = parallel.context, parallel.tensor, parallel.layout
        documents: Any = parity.RandomDocuments(settings.model.vocab)
        self.planner = Planner(documents, train.batch_tokens, train.micro_batch_tokens, *degrees)
        self.settings, self.groups, self.position = settings, groups, self.planner.position

    def at(self, position: Any) -> "StubData":
        self.position = position
        return self

    def training(self, step: int) -> tuple[Any, float]:
        plan = self.planner.step(step % parity.STEPS, self.groups.data_rank, self.groups.data_size)
        return plan.on_rank(self.groups.context_rank, self.groups.device, self.groups.context), 0.0

    def flops_of_all(self, own: float) -> float:
        return own


def run(
    rank: int,
    world_size: int,
    changes: dict[str, Any],
    place: str = "",
    seconds: float = 0.0,
    *,
    ranks_per_node: int = 8,
    clock_ahead: float = 0.0,
    every: int = 1,
    reports: int = 1,
) -> list[Any]:
    """The waterfalls of a run's steps, as `lsys.train.run.Run` reports them.

    Args:
        place: where a delay of so many `seconds` is planted in each step, see `planted`.
        clock_ahead: s by which the clocks of the last node are ahead.
        every: `metrics.waterfall_every`. reports: `metrics.every`.
    """
    from lsys.config.schema import Checkpoint, Metrics
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.run import Run

    metrics = Metrics(every=reports, tensorboard=False, waterfall_every=every)
    small = dict(model__pattern="LS", model__layers=2, train__steps=STEPS)
    settings = parity.settings(**small | changes)
    checkpoint = Checkpoint(save=place == "checkpoint", every=1)
    settings = settings.model_copy(update={"metrics": metrics, "checkpoint": checkpoint})
    launch = Launch(rank=rank, world_size=world_size, node=rank // ranks_per_node)
    ahead = clock_ahead if launch.node == (world_size - 1) // ranks_per_node else 0.0
    seen: list[Any] = []
    true_time = time.perf_counter
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(time, "perf_counter", lambda: true_time() + ahead))
        stack.enter_context(mock.patch("lsys.observe.hardware.peak_of_ranks", lambda *_: None))
        stack.enter_context(mock.patch("lsys.train.data.open_data", StubData))
        stack.enter_context(mock.patch("lsys.train.run.ThreadPoolExecutor", Now))
        groups = stack.enter_context(process_groups(settings.parallel, launch))
        stack.enter_context(below_the_hooks(place, seconds))
        whole = Run(settings, groups)
        planted(whole, place, seconds, rank)
        reported = mock.patch.object(whole.reporter, "training", lambda *_, waterfall, **__: seen.append(waterfall))
        stack.enter_context(reported)
        whole.train()
    return seen


def planted(whole: Any, place: str, seconds: float, rank: int) -> None:
    """A delay in each step: in the forward pass of the first layer ("compute": on all ranks, "rank": on rank 1 only; "stage":
    in the second of two stages), in the loader ("data"), or instead of writing a checkpoint ("checkpoint")."""
    if place == "compute" or (place in ("rank", "stage") and rank == 1):
        calls = iter(range(10**9))
        count = whole.settings.micro_batches // whole.groups.data_size
        first = whole.engine.chunks[0].module.decoder.layers[0]
        first.register_forward_pre_hook(lambda *_: time.sleep(seconds) if next(calls) % count == 0 else None)
    if place == "checkpoint":
        whole.checkpoints.save = lambda *_: time.sleep(seconds)
    if place == "data":
        whole.data.training = after(seconds, whole.data.training)


def after(seconds: float, original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, begun so many seconds late."""

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return original(*args, **kwargs)

    return late


@contextlib.contextmanager
def below_the_hooks(place: str, seconds: float) -> Iterator[None]:
    """With "collective", each reduce-scatter takes so much longer; of one data-parallel bucket there is one in a step."""
    if place != "collective":
        yield
        return

    group = dist.ProcessGroup
    with contextlib.ExitStack() as stack:
        for name in REDUCE_SCATTERS:
            if name in vars(group):
                stack.enter_context(mock.patch.object(group, name, after(seconds, vars(group)[name])))
        yield
