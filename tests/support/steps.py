"""Real engine steps of small models, as the predictor's tests look at them: their operations, tensors and live bytes."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from support import parity
from support.memory import engine_bytes, peak_bytes


def operations(
    rank: int, world_size: int, changes: dict[str, Any], steps: int = 2, ranks_per_node: int = 8
) -> dict[str, Any]:
    """What one rank issues in the last of some steps, and the bytes of what its engine holds."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.parallel.ledger import record
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = parity.settings(**changes)
    train, parallel = config.train, config.parallel
    with process_groups(parallel, Launch(rank=rank, world_size=world_size, node=rank // ranks_per_node)) as groups:
        engine = Engine(config, groups)
        stream: Any = parity.RandomDocuments(config.model.vocab)
        planner = Planner(
            stream, train.batch_tokens, train.micro_batch_tokens, parallel.context, parallel.tensor, parallel.layout
        )
        for step in range(steps):
            plan = planner.step(step, groups.data_rank, groups.data_size)
            batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
            with record() as ledger:
                engine.forward_backward(batches)
                engine.step()
        counts = Counter((e.axis, e.operation.kind, e.operation.bytes, len(e.ranks)) for e in ledger.events)
        return {
            "counts": counts,
            "bytes": _sums(ledger),
            "lengths": [micro.layout.lengths for micro in plan.micro_batches],
            "tensors": engine_bytes(engine),
        }


def _sums(ledger: Any) -> dict[tuple[str, str, str], int]:
    """By axis, link class and direction."""
    axes = {event.axis for event in ledger.events}
    return {
        (axis, link, way): ledger.bytes(axis=axis, link=link, direction=way)
        for axis in axes
        for link in ("node", "network")
        for way in ("sent", "received")
    }


def peak(rank: int, world_size: int, changes: dict[str, Any], lengths: tuple[int, ...]) -> int:
    """Most bytes of tensors that were made in a forward and backward pass and alive together; every micro-batch has these documents."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = parity.settings(**changes)
    train, parallel = config.train, config.parallel
    with process_groups(parallel, Launch(rank=rank, world_size=world_size)) as groups:
        engine = Engine(config, groups)
        stream: Any = SameDocuments(config.model.vocab, lengths)
        planner = Planner(
            stream, train.batch_tokens, train.micro_batch_tokens, parallel.context, parallel.tensor, parallel.layout
        )
        batches = planner.step(0, groups.data_rank, groups.data_size).on_rank(
            groups.context_rank, groups.device, groups.context
        )
        engine.forward_backward(batches)
        engine.step()
        batches = planner.step(1, groups.data_rank, groups.data_size).on_rank(
            groups.context_rank, groups.device, groups.context
        )
        return peak_bytes(engine, batches)


class SameDocuments:
    """A stream whose every micro-batch holds documents of the same lengths."""

    def __init__(self, vocab: int, lengths: tuple[int, ...]) -> None:
        self.vocab, self.lengths = vocab, lengths

    def batch(self, start: int, count: int) -> Any:
        assert sum(self.lengths) == count
        tokens = np.random.default_rng(start).integers(0, self.vocab, count)
        return SimpleNamespace(
            lengths=np.array(self.lengths), tokens=tokens, targets=tokens, loss_mask=np.ones(count, dtype=np.float32)
        )


def check_told(config: Any, rank: int, found: dict[str, Any], replica: int) -> None:
    """What the predictor says of a rank, of two, is what `operations` found: every byte of a step, parameters and optimizer states."""
    from lsys.predict.deployment import Deployment
    from lsys.predict.traffic import StepTraffic
    from lsys.predict.weights import weights

    told: Counter[Any] = Counter()
    for lengths in found["lengths"]:
        deployment = Deployment(config, 2, gpu=False, lengths=lengths)
        for key, size in StepTraffic(deployment).bytes(rank).items():
            if key[0] == "context":
                told[key] += size // deployment.micro_batches
            elif key[0] != "world":
                told[key] = size
    assert dict(told) == {key: size for key, size in found["bytes"].items() if size}
    held = weights(Deployment(config, 2, gpu=False), 0, replica)
    assert found["tensors"] == {key: getattr(held, key) for key in ("parameters", "gradients", "optimizer")}
