"""Megatron's traffic in the ledger: what tensor, pipeline and data parallelism move in a training step."""

from collections import defaultdict
from typing import Any

from lsys.parallel.ledger import OTHER, record


def _train_step(rank: int, ranks: int, changes):
    """A training step's operations as (axis, kind, bytes) -> calls, bytes sent by axis, and sizes of the model."""
    from support.parity import RandomDocuments, settings

    from lsys.data.plan import Planner
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = settings(**changes)
    with process_groups(config.parallel, Launch(rank=rank, world_size=ranks)) as groups:
        engine = Engine(config, groups)
        degrees = config.parallel.context, config.parallel.tensor
        documents: Any = RandomDocuments(config.model.vocab)
        planner = Planner(documents, config.train.batch_tokens, config.train.micro_batch_tokens, *degrees)
        plan = planner.step(0, groups.data_rank, groups.data_size)
        batches = plan.on_rank(groups.context_rank, groups.device, groups.context)
        with record() as ledger:
            engine.forward_backward(batches)
            engine.step()
        found: dict[Any, int] = defaultdict(int)
        for event in ledger.events:
            if len(event.ranks) > 1:
                found[event.axis, event.operation.kind, event.operation.bytes] += 1
        gradients = sum(buffer.grad_data.nbytes for chunk in engine.chunks for buffer in chunk.buffers)
        axes = {event.axis for event in ledger.events}
        sent = {axis: ledger.bytes(axis) for axis in axes}
        return dict(found), sent, dict(batches=len(batches), slots=batches[0].slots, gradients=gradients)


def test_tensor_parallel_traffic(gloo):
    for found, sent, sizes in gloo(2, _train_step, dict(parallel__tensor=2)):
        layers, batches, activations = 4, sizes["batches"], sizes["slots"] * 32 * 4  # [slots, hidden] in fp32
        # A mixer or MLP gathers before its first product and reduce-scatters after its last. Backward does both the other
        # way round, and gathers the first product's input again. So do the output layer and the embedding, each half.
        gathers, scatters = layers * 2 * 3 + 3, layers * 2 * 2 + 2
        assert found["tensor", "all_gather", activations // 2] == batches * gathers
        assert found["tensor", "reduce_scatter", activations] == batches * scatters
        # Maximum, sum, target's logit and z-loss of the cross-entropy.
        assert found["tensor", "all_reduce", sizes["slots"] * 4] == batches * 4
        once = {key: calls for key, calls in found.items() if key[:2] == ("tensor", "all_reduce") and calls == 1}
        ((_, _, norms),) = once  # gradients of what all ranks hold whole: one sum a step
        moved = batches * (gathers * activations // 2 + scatters * activations + 4 * sizes["slots"] * 4) + norms
        assert sent["tensor"] == moved
        assert OTHER not in sent


def _two_meshes(rank: int, ranks: int):
    """One after the other in one process, of which autograd's hooks of Megatron's first keep its groups."""
    _train_step(rank, ranks, {})
    return _train_step(rank, ranks, dict(parallel__pipeline=2))


def test_a_mesh_that_ended_takes_nothing_of_the_next(gloo):
    for found, _, _ in gloo(2, _two_meshes):
        assert {axis for axis, *_ in found} == {"pipeline", "model"}


def test_pipeline_parallel_traffic(gloo):
    for rank, (found, sent, sizes) in enumerate(gloo(2, _train_step, dict(parallel__pipeline=2))):
        activations = sizes["slots"] * 32 * 4
        for kind in ("send", "recv"):  # activations one way, their gradients the other
            assert found["pipeline", kind, activations] == sizes["batches"]
        embedding = 64 * 32 * 4  # both stages hold it, padded to a multiple of 8 rows, and sum its gradients
        assert found["pipeline", "all_reduce", embedding] == 1
        broadcasts = sum(size for (_, kind, size), calls in found.items() if kind == "broadcast" for _ in range(calls))
        from_last = broadcasts if rank == 1 else 0  # numbers of tokens, and the losses
        assert sent["pipeline"] == sizes["batches"] * activations + embedding + from_last
        assert OTHER not in sent


def test_data_parallel_traffic(gloo):
    for found, sent, sizes in gloo(2, _train_step, {}):
        gradients = sizes["gradients"]
        assert found["data", "reduce_scatter", gradients] == 1  # in fp32, as the parameters
        assert found["data", "all_gather", gradients // 2] == 1
        losses = sum(size for (axis, kind, size) in found if (axis, kind) == ("data", "all_reduce"))
        assert sent["data"] == gradients + gradients // 2 + losses  # gloo's reduce-scatter moves twice its half
        assert OTHER not in sent
