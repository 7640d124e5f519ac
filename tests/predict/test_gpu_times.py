"""Times on GPUs, where nothing is measured: each against what it is made of, by hand."""

from typing import Any

import pytest

from lsys.config.load import load
from lsys.parallel.links import NETWORK, NODE
from lsys.parallel.traffic import Operation
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import hardware
from lsys.predict.kernel_memory import FUSED
from lsys.predict.plan import Plan
from lsys.predict.search import changed, search
from lsys.predict.seconds import StepTime
from lsys.predict.traffic import StepTraffic
from lsys.predict.transfers import Transfers, once
from lsys.predict.weights import chunk_parameters, weights
from lsys.predict.work import StageWork

H200 = hardware("h200x8", "bf16")


def config(name: str = "hybrid_1b", **changes: Any) -> Any:
    return changed(load(f"configs/{name}.yaml"), {key.replace("__", "."): value for key, value in changes.items()})


def transfers(world_size: int, gpu: bool = True) -> Transfers:
    return Transfers(Deployment(config(), world_size, 8, gpu=gpu), H200)


def test_a_collective_leaves_a_node_through_the_ports_of_all_its_ranks() -> None:
    """2^30 bytes of a ring over 2 nodes: with 8 ranks on each an eighth by every port."""
    it, size = transfers(64), 2**30
    for step, ports in ((1, 8), (2, 4), (8, 1)):
        ranks = range(0, 16, step)
        whole, none = (it.operation(once("data", ranks, Operation("reduce_scatter", n)), 0) for n in (size, 0))
        moved = size * (len(ranks) - 1) / len(ranks)
        bound = max(moved / ports / H200.links[NETWORK].bandwidth, moved / H200.links[NODE].bandwidth)
        assert whole - none == pytest.approx(bound, rel=1e-6), ports


def test_gloo_has_one_port() -> None:
    it, operation = transfers(64, gpu=False), Operation("reduce_scatter", 2**30)
    times = [it.operation(once("data", range(0, 16, step), operation), 0) for step in (1, 8)]
    assert times[0] > times[1]


def test_a_small_sum_goes_through_a_tree() -> None:
    """512 ranks on 64 nodes: 7 steps along a node's chain and 6 between nodes, there and back."""
    took = transfers(512).operation(once("world", range(512), Operation("all_reduce", 4)), 0)
    steps = 2 * 7 * H200.links[NODE].latency + 2 * 6 * H200.links[NETWORK].latency
    assert took == pytest.approx(H200.call + steps, rel=0.05)


def test_a_sum_inside_a_node_takes_the_fewer_steps_of_ring_and_chain() -> None:
    took = transfers(64).operation(once("tensor", range(8), Operation("all_reduce", 4)), 0)
    assert took == pytest.approx(H200.call + 14 * H200.links[NODE].latency, rel=0.05)


@pytest.mark.parametrize("linear", ["lasp2", "ulysses"])
def test_heads_are_waited_for_and_rings_are_not(linear: str) -> None:
    """A mixer's work hides what is under way beside it, which heads and tokens before a segment are not."""
    changes: dict[str, Any] = {"parallel__context": 8, "parallel__linear": linear}
    ring, heads = (
        StepTime(Deployment(config(**changes, parallel__attention=method), 64), H200) for method in ("ring", "ulysses")
    )
    (there, back), beside = heads.mixer_exchange("softmax", False)
    assert there > 0 and back > 0 and beside == (0, 0)
    assert ring.mixer_exchange("softmax", False)[0] == (0, 0)
    linear_waits, linear_beside = ring.mixer_exchange("lightning", False)
    assert (linear_waits > (0, 0), linear_beside > (0, 0)) == (linear == "ulysses", linear == "lasp2")
    layers = sum(kind.mixer == "softmax" for kind in heads.deployment.kinds(0))
    assert heads.context_seconds(0, 0)[0] - ring.context_seconds(0, 0)[0] == pytest.approx(layers * there)


def test_halos_are_waited_for() -> None:
    it = StepTime(Deployment(config("delta_1b", parallel__linear="lasp2", parallel__context=8), 64), H200)
    waits, beside = it.mixer_exchange("gated_delta", False)
    assert min(*waits, *beside) > 0


def test_buckets_close_by_the_data_degree_alone() -> None:
    """Megatron: max(40 million, 1 million x data ranks without context ranks) numbers, and the parameter that exceeds it."""
    deployment = Deployment(config(parallel__context=8), 512)
    assert deployment.mesh.data == 64 and deployment.replicas == 512
    found = weights(deployment, 0).buckets[0]
    largest = max(parameter.numel for parameter in chunk_parameters(deployment, 0, 0))
    assert all(64_000_000 <= bucket <= 64_000_000 + largest + 512 * 128 for bucket in found[:-1])


def test_the_rank_that_receives_most_is_looked_for_on_all_stages() -> None:
    """Softmax layers only at the end of many stages: what their ranks exchange is nearly everything."""
    plan = Plan(
        config(
            model__pattern="L" * 23 + "S", parallel__pipeline=8, parallel__context=64, train__micro_batch_tokens=2**19,
            train__batch_tokens=2**19 * 8,
        ),
        512, H200,
    )  # fmt: skip
    last = StepTraffic(plan.deployment).bytes(plan.deployment.rank(7)).moved("context")
    assert plan.traffic()["context"].moved("context") >= last > 0


def test_search_keeps_tensor_groups_inside_nodes() -> None:
    found = search(
        config(model__heads=24, model__groups=24, model__hidden=3072, train__batch_tokens=65536 * 48), 48, H200, 50
    )
    assert found and {plan.config.parallel.tensor for _, plan in found} <= {1, 2, 4, 8}


def test_a_group_that_straddles_nodes_is_timed_over_the_network() -> None:
    """Of tensor groups of 6 on nodes of 8, the first is inside a node and the second is not."""
    changes: dict[str, Any] = dict(
        model__heads=24, model__groups=24, model__hidden=3072, model__ffn=8448, model__vocab=30720
    )
    deployment = Deployment(
        config(**changes, parallel__tensor=6, parallel__context=1, train__batch_tokens=65536 * 8), 48
    )
    inside = Deployment(deployment.config, 48, ranks_per_node=12)
    times = [StepTime(each, H200).tensor_seconds(0, 0)[0] for each in (deployment, inside)]
    assert times[0] > 2 * times[1]


def test_what_has_no_fused_kernel_is_planned_in_chunks() -> None:
    """The table of variants against what the kernels refuse; and what it means for a layer's time and memory."""
    import torch

    from lsys.kernels.linear_attention.chunked.chunks import Tokens
    from lsys.kernels.linear_attention.gpu import triton_refusal

    x, beta = torch.empty(1, 1, 8, dtype=torch.bfloat16, device="meta"), torch.empty(1, 1, device="meta")
    decays = {"head": torch.empty(1, device="meta"), "token": beta, "channel": x.float()}
    for name, decay in decays.items():
        for delta in (None, beta):
            key = name if delta is None else "channel delta" if name == "channel" else "delta"
            refusal = triton_refusal(Tokens(x, x, x, decay, delta))
            assert refusal is not None and ("runs on CUDA, not on meta" in refusal) == (key in FUSED), (key, refusal)
    seconds = []
    for letter, wanted in (("D", "fused:D"), ("K", "linked:K")):
        work = StageWork(Deployment(config(model__pattern=letter), 64))
        (layer,) = work.activations.layers
        mixer = work.mixer(layer, work.deployment.methods)
        assert [key for key in mixer if key.partition(":")[0] in ("kernel", "linked", "fused")] == [wanted]
        assert all(amount * H200.costs[key] > 0 for key, amount in mixer.items())
        seconds.append(H200.seconds(mixer))
    assert seconds[1] > 3 * seconds[0]
