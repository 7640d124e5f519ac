"""Every term of a prediction for one small shape, worked out by hand from what Megatron and the kernels do: FLOPs, bytes, seconds.

Sixteen tokens of one document, hidden width 8, two heads of 4 with one group of keys, an MLP of width 12, a vocabulary of 32, bf16 on a
GPU: a softmax layer and a Lightning layer. The toy's links take 1 s and move 16 bytes a second, a call takes 1/4 s.
"""

from typing import Any

import pytest

from lsys.config import Config
from lsys.config.losses import LOSSES
from lsys.mixers.card import Layer
from lsys.parallel.links import NETWORK, NODE, Link
from lsys.predict.activations import Activations
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import Hardware, hardware
from lsys.predict.plan import Plan
from lsys.predict.seconds import StepTime
from lsys.predict.traffic import StepTraffic
from lsys.predict.weights import weights
from lsys.predict.work import StageWork

T, SOFTMAX, LIGHTNING = 16, Layer("softmax", "dense"), Layer("lightning", "dense")
# Elements of weights: in, out; both of the MLP.
S_IN, S_OUT, L_IN, L_OUT, FC1, FC2 = 16 * 8, 8 * 8, 32 * 8, 8 * 8, 24 * 8, 12 * 8
PAIRS = 16 * 17 // 2


def deployed(
    ranks: int = 1,
    pattern: str = "SL",
    groups: int = 1,
    recompute: str = "none",
    optimizer: dict[str, Any] | None = None,
    **parallel: Any,
) -> Deployment:
    model = dict(
        pattern=pattern, layers=2, hidden=8, heads=2, groups=groups, head_dim=4, ffn=12, vocab=32, vocab_multiple=32
    )
    train = dict(folder="x", steps=5, batch_tokens=2 * T, micro_batch_tokens=T, recompute=recompute)
    tree = {"model": model, "parallel": parallel, "data": {"corpora": [{"path": "a"}]}, "train": train}
    tree["optimizer"] = optimizer or {}
    return Deployment(Config.model_validate(tree), ranks, ranks_per_node=2, gpu=True)


def toy(cores: int | None = None, **costs: Any) -> Hardware:
    """Costs by the quantities' names, of layers as `S` and `L`; all else costs nothing."""
    named = {"layer:S": 0.0, "layer:L": 0.0} | {name.replace("_of_", ":"): cost for name, cost in costs.items()}
    links = {NODE: Link(1.0, 16.0), NETWORK: Link(3.0, 4.0)}
    return Hardware("toy", 2, True, peak={"bf16": 1e4}, costs=named, links=links, call=0.25, overlap=0.5, cores=cores)


# ---- bytes that are held


def test_a_softmax_layer_keeps() -> None:
    """A token's q has 8 channels of 2 bytes, k and v 4; a norm keeps its output and a number in fp32, and its input is the residual stream."""
    norm, residual = 2 * 8 + 4, 2 * 8
    found = Activations(deployed()).layers[SOFTMAX]
    assert found.entry == T * norm
    assert found.projected == found.inputs == T * 2 * (8 + 4 + 4)
    rotated, copied, statistics = (
        2 * (8 + 4),
        2 * 8,
        4 * (2 + 1),
    )  # QK-norm: of the queries a copy, of each head a number
    output, log_sums = 2 * 8, 4 * 2
    assert found.before == T * (rotated + copied + statistics + output + log_sums) and found.after == 0
    assert found.mixed == T * 2 * 8 and found.middle == T * (2 * 8 + residual + norm)
    assert found.mlp == T * (2 * 3 * 12 + residual)  # both halves and their product
    assert found.workspace == T * 2 * (8 + 4 + 4 + 8)  # gradients of q, k, v, and of the output
    assert found.whole == T * (norm + 32 + 76 + 52 + 88)


def test_a_lightning_layer_keeps() -> None:
    """q, k, v and the gate have 8 channels each; SiLU's output is kept; the output of heads is normalised, weighed and gated."""
    norm, residual = 2 * 8 + 4, 2 * 8
    found = Activations(deployed()).layers[LIGHTNING]
    assert found.projected == T * 2 * 32
    assert found.before == T * 2 * (8 + 8 + 8)
    assert found.after == T * (
        2 * 8 + 2 * 2 * 8 + 4 * 2 + 2 * 8
    )  # output; normalised, weighed; a number a head; the gate
    assert found.middle == T * (2 * 8 + residual + norm) and found.mlp == T * (2 * 3 * 12 + residual)


def test_the_peak_of_two_softmax_layers_is_at_the_logits() -> None:
    held = T * (20 + 32 + 76 + 52 + 88)
    first, tables = T * 2 * 8, T * 4 * 4  # the first layer's input; two cosines and two sines a token
    logits = T * (2 * 8 + 4) + 6 * T * 32  # the last norm; logits in bf16 and fp32
    peak = Activations(deployed(pattern="S")).peak(0)
    assert peak.held == {SOFTMAX: 2 * held} and peak.rest == first + tables + logits


def test_a_loss_in_chunks_keeps_the_hidden_stream_twice_and_a_gradient_of_the_output_layer() -> None:
    """Logits of 1,024 tokens, or of all that there are, in bf16 and fp32; a chunk's product in bf16 and the sum of all in fp32."""
    for slots in (100, 5000):
        found = LOSSES["chunked_cross_entropy"].workspace(slots, 8, 32, 2, 0.0)
        assert found == 6 * min(slots, 1024) * 32 + (4 + 2) * 32 * 8 + 2 * 2 * slots * 8


def test_weights_gradients_and_states() -> None:
    """Each parameter begins at a multiple of 64 in its buffer, whose end is padded to 128. Adam: two moments and a copy, 4 bytes each."""
    softmax = [8, S_IN, S_OUT, 4, 4, 8, FC1, FC2]  # norm, in, out, the norms of q and k, norm, MLP
    lightning = [8, L_IN, L_OUT, 8, 8, FC1, FC2]
    every = [32 * 8, *softmax, *lightning, 8]
    placed = sum(-(-n // 64) * 64 for n in every)
    assert placed % 128 == 0
    found = weights(deployed(), 0)
    assert (found.count, found.tensors, found.buckets) == (sum(every), 17, ((placed,),))
    assert (found.parameters, found.gradients, found.optimizer) == (2 * placed, 4 * placed, 12 * sum(every) + 4 * 17)
    half = [weights(deployed(2), 0, replica) for replica in (0, 1)]
    assert sum(each.updated for each in half) == sum(every)
    assert all(each.optimizer == 12 * each.updated + 4 * each.tensors for each in half)


# ---- work


def test_work_of_a_micro_batch_forward_and_backward() -> None:
    elements = S_IN + S_OUT + L_IN + L_OUT + 2 * (FC1 + FC2)
    forward, backward = StageWork(deployed()).chunk(0, 0, deployed().methods)
    layers = Activations(deployed()).layers
    assert forward == {
        "micro_batch": 1, "layer:S": 1, "layer:L": 1,
        "matmul": 2 * T * (elements + 32 * 8), "weights": elements,  # the embedding's rows are looked up
        "attention": 4 * 2 * 4 * PAIRS, "kernel:S": layers[SOFTMAX].before,
        "fused:L": T * 2 * (4 * 8),  # q, k, v read, o written
        "bytes": sum(each.entry + each.after + each.middle + each.mlp for each in layers.values()),
        "logits": T * 4 * 32,
    }  # fmt: skip
    alike = ("micro_batch", "bytes", "weights", "logits")
    known = {f"{name}_backward": forward[name] for name in alike}
    known |= {"layer_backward:S": 1, "layer_backward:L": 1, "kernel_backward:S": forward["kernel:S"]}
    known |= {"fused_backward:L": forward["fused:L"], "matmul": 2 * forward["matmul"]}
    assert backward == known | {"attention_backward": 2.5 * forward["attention"]}


def test_what_is_recomputed_is_done_again() -> None:
    plain, selective, full = (
        StageWork(deployed(recompute=what)).chunk(0, 0, deployed().methods)[1] for what in ("none", "selective", "full")
    )
    mixers = {"attention": 4 * 2 * 4 * PAIRS, "kernel:S": 76 * T, "fused:L": 64 * T, "layer:S": 1, "layer:L": 1}
    assert {k: selective[k] - plain[k] for k in selective if selective[k] != plain[k]} == mixers | {
        "bytes": T * (52 + 52 + 72)
    }
    elements = S_IN + S_OUT + L_IN + L_OUT + 2 * (FC1 + FC2)
    assert {k: full[k] - plain[k] for k in full if full[k] != plain[k]} == mixers | {
        "matmul": 2 * T * elements, "weights": elements, "bytes": T * (52 + 52 + 72 + 2 * (20 + 88))
    }  # fmt: skip


def test_work_of_an_update() -> None:
    held = weights(deployed(), 0)
    assert StageWork(deployed()).update(0) == {"optimizer": 1400, "tensors": 17, "gradients": held.gradients, "step": 1}


# ---- bytes that are moved


def moved(ranks: int, axis: str, groups: int = 1, **parallel: Any) -> dict[str, int]:
    """Bytes that each rank sends along an axis."""
    found = StepTraffic(deployed(ranks, groups=groups, **parallel))
    return {str(rank): found.bytes(rank).moved(axis, way="sent") for rank in range(ranks)}


def test_data_ranks_move_gradients_and_parameters() -> None:
    """Of 1,920 elements half of the gradients' fp32 sums and half of the parameters; sums of 4 bytes, and three of 8."""
    assert moved(2, "data") == dict.fromkeys("01", 4 * 1920 // 2 + 2 * 1920 // 2 + 4 + 3 * 8)


def test_replicas_ask_each_other_whether_gradients_are_finite() -> None:
    """With the plain optimizer, once a step, in 8 bytes; a rank without a replica asks nobody."""
    for distributed, ranks, asks in ((False, 1, 0), (False, 2, 1), (True, 2, 0)):
        deployment = deployed(ranks, optimizer={"distributed": distributed})
        found = [each for each in StepTraffic(deployment).operations(0) if each.axis == "data"]
        assert [each.operation.bytes for each in found].count(8) == asks


def test_context_ranks_move_keys_values_and_states() -> None:
    """Pieces of four tokens: rank 0 has the first and last, and sends the first; rank 1 sends both of its own.

    A token's key and value are 16 bytes, their gradients 32; a layer's states of a rank, two of [2, 4, 4] in fp32, 256 there and back.
    """
    states, micro_batches = 2 * 256, 2
    first = 4 * 16 + 4 * 16 + 8 * 32  # keys forward, backward, and the gradients of the other's
    second = 8 * 16 + 8 * 16 + 4 * 32
    assert moved(2, "context", context=2) == {
        "0": micro_batches * (first + states),
        "1": micro_batches * (second + states),
    }


def test_tensor_ranks_move_the_residual_stream() -> None:
    """Half of 16 x 8 x 2 bytes each time: 4 projections in and 4 out, the embedding, the output layer; three sums of the loss; norms."""
    gathers = 4 * (1 + 1 + 1) + 1 + 2  # in; in again, backward; out, backward; embedding; output layer, there and again
    scatters = 4 * (1 + 1) + 1 + 1
    norms = 4 * (3 * 8 + 4 + 4 + 8 + 8)  # gradients of both layers', of q's and k's, of the last
    assert moved(2, "tensor", groups=2, tensor=2) == dict.fromkeys(
        "01", 2 * ((gathers + scatters) * 128 + 3 * 4 * T) + norms
    )


def test_stages_move_the_residual_stream() -> None:
    """Of two micro-batches, 256 bytes each; once, the tied embedding's gradient; what is reported, from the last stage."""
    assert moved(2, "pipeline", pipeline=2) == {"0": 2 * 256 + 4 * 256, "1": 2 * 256 + 4 * 256 + 4 + 3 * 8}


# ---- seconds


def test_compute_is_work_at_its_rates() -> None:
    """Each quantity by itself takes its amount, of two micro-batches or of one update."""
    forward, backward = StageWork(deployed()).chunk(0, 0, deployed().methods)
    once = StageWork(deployed()).update(0)
    for name in {**forward, **backward, **once}:
        twice = 2 * (forward[name] + backward[name])
        costs: Any = {name.replace(":", "_of_"): 2.0}
        found = StepTime(deployed(), toy(**costs)).predict()
        assert found.parts["compute"] == 2.0 * (twice + once[name]), name
        assert found.seconds == sum(found.parts.values())


def test_work_hides_messages_of_context_ranks_as_far_as_it_goes() -> None:
    """A phase takes a call, a latency and its bytes: keys 1/4 + 1 + 128 / 16, gradients of keys 1/4 + 1 + 256 / 16, states as these.

    Half of a layer's 10 and 4 s hides them forward, all of it backward.
    """
    it = StepTime(deployed(2, context=2), toy(layer_of_S=10.0, layer_of_L=4.0))
    assert it.mixer_exchange("softmax", False) == ((0, 0), (9.25, 9.25 + 17.25))
    assert it.mixer_exchange("lightning", False) == ((0, 0), (17.25, 17.25))
    assert it.context_seconds(0, 0) == ((9.25 - 5) + (17.25 - 2), (26.5 - 10) + (17.25 - 4))
    hidden = StepTime(deployed(2, context=2), toy(layer_of_S=100.0, layer_of_L=100.0))
    assert hidden.context_seconds(0, 0) == (0, 0)
    assert it.predict().parts["exposed_context"] == 2 * (19.5 + 29.75)


def test_products_hide_backward_messages_of_tensor_ranks() -> None:
    """A gather or scatter takes 1/4 + 1 + 128 / 16 s, a sum of 64 bytes 1/4 + 2 + 64 / 16."""
    each, total = 9.25, 6.25
    forward = 8 * each + each + each + 3 * total  # 4 in and 4 out; embedding; output layer and loss
    backward = 4 * each + 8 * each + each + 2 * each  # out; in, both ways; embedding; output layer
    free = StepTime(deployed(2, groups=2, tensor=2), toy())
    assert free.tensor_seconds(0, 0) == (forward, backward)
    # At 1 / 1024 s a FLOP a product into 12, 16 and 12 of a rank's channels takes 2 x 16 x 8 x n / 1024 s, and hides both messages beside it.
    hides = sum(2 * 2 * T * 8 * n / 1024 for n in (12, 16, 12, 12))
    timed = StepTime(deployed(2, groups=2, tensor=2), toy(matmul=1 / 1024))
    assert timed.tensor_seconds(0, 0) == (forward, backward - hides)


def test_passes_hide_gradients_and_parameters() -> None:
    """Sums of 4 and 24 bytes, then the gradients and the parameters; the last backward and the next forward pass are 100 s."""
    whole = (0.25 + 2 + 4 / 16) + (0.25 + 2 + 24 / 16) + (0.25 + 1 + 3840 / 16) + (0.25 + 1 + 1920 / 16)
    exposed = [
        StepTime(deployed(2), toy(micro_batch=f, micro_batch_backward=b)).predict().parts["exposed_data"]
        for f, b in ((0.0, 0.0), (30.0, 70.0), (300.0, 70.0))
    ]
    assert exposed == [whole, whole - 100, 0.0]


def test_stages_wait_for_each_other() -> None:
    """Passes of 30 and 70 s, a border of 1/4 + 1 + 256 / 16: the second stage ends its passes at 77.25, 147.25, 194.5 and 264.5 s."""
    border = 17.25
    end = (
        (30 + border) + (30 + 70 + border) + (30 + 70 + border) + 70
    )  # the second stage's way, then the first's last pass
    found = StepTime(deployed(2, pipeline=2), toy(micro_batch=30.0, micro_batch_backward=70.0)).predict().parts
    assert found["compute"] == 2 * 100 and found["bubble"] == end - 200 - 2 * border
    reports, embedding = (0.25 + 1 + 4 / 16) + (0.25 + 1 + 24 / 16), 0.25 + 2 + 4 * 256 / 16
    assert found["exposed_pipeline"] == 2 * border + reports + embedding


def test_ranks_that_share_a_core_take_turns() -> None:
    """Two ranks on one core: passes of 100 s and an update of 5 s take twice as long."""
    parts = StepTime(deployed(2), toy(cores=1, micro_batch=30.0, micro_batch_backward=70.0, step=5.0)).predict().parts
    assert (parts["compute"], parts["core"]) == (105.0, 105.0)


def test_a_plan_s_figures() -> None:
    """Model FLOPs: three times those of products, of pairs, and of states: 4 x 4 x 4 a head, and 2 x 64 x (4 + 4) in a chunk of 64."""
    hardware = toy(step=7.0)
    plan = Plan(deployed().config, 1, hardware)
    elements = S_IN + S_OUT + L_IN + L_OUT + 2 * (FC1 + FC2) + 32 * 8
    flops = 2 * 3 * (2 * T * elements + 4 * 2 * 4 * PAIRS + T * 2 * (4 * 4 * 4 + 2 * 64 * (4 + 4)))
    seconds = plan.prediction.seconds
    assert (
        seconds == 7.0 + 8 * 0.25
    )  # calls without partners: two of the stages, four of the data ranks, the norm, whether to stop
    assert plan.mfu == pytest.approx(flops / (seconds * 1e4), rel=1e-12)
    assert plan.tokens_per_second == 32 / seconds and plan.hours == 5 * seconds / 3600


def test_rates_of_a_data_sheet() -> None:
    """H100: 989 TFLOP/s in bf16, 3.35 TB/s, of which the parts are reached that lsys.predict.hardware names."""
    found = hardware("h100x8", "bf16").costs
    byte = 1 / (0.8 * 3.35e12)
    known: dict[str, Any] = {
        "matmul": 1 / (0.65 * 989e12), "attention": 1 / (0.5 * 989e12), "attention_backward": 1 / (0.5 * 989e12),
        "bytes": 2 * byte, "bytes_backward": 3 * byte, "logits": 3 * byte, "logits_backward": 2 * byte,
        "optimizer": 28 * byte, "gradients": 3 * byte, "weights_backward": 10 * byte, "micro_batch": 1e-5, "step": 1e-3,
        "layer:S": 3e-5, "layer_backward:S": 3e-5, "kernel:S": 2 * byte, "kernel_backward:S": 3 * byte,
        "fused:L": 1 / (0.15 * 3.35e12), "fused_backward:L": 1.75 / (0.15 * 3.35e12),
        "kernel:L": 2 * byte / 0.3, "kernel_backward:L": 3 * byte / 0.3, "linked:L": 2 * byte / 0.3,
    }  # fmt: skip
    assert {name: found[name] for name in known} == pytest.approx(known, rel=1e-12)
