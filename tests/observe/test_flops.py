"""Parameters and FLOPs against the model that is built, and against what torch counts."""

import math

import pytest
import torch

from lsys.config.model import Model
from lsys.config.schema import Config
from lsys.observe.flops import CHUNK, flops_per_token, parameters, recompute_flops_per_token, training_flops
from lsys.observe.hardware import cpu_peak, gpu_peak, peak, peak_of_ranks

BASE = dict(layers=5, hidden=48, heads=6, groups=2, head_dim=10, ffn=80, vocab=61, vocab_multiple=8)
VARIANTS = [
    {},
    dict(pattern="S", qk_norm=False, tied=False),
    dict(pattern="LS", linear=dict(heads=3, head_dim=16)),
    dict(pattern="WLS", window=9),
    dict(pattern="RGMDL", linear=dict(norm="srms", lrpe="first")),
    dict(pattern="RGMDL", linear=dict(heads=4, key_heads=2, head_dim=6, key_dim=8, gate_rank=5, conv_width=3)),
]


def built(rank: int, world_size: int, changes: dict) -> tuple[int, int]:
    """(parameters, FLOPs of matrix products outside attention) of the real model on one rank."""
    from lsys.runtime import install_megatron

    install_megatron()
    from torch.utils.flop_counter import FlopCounterMode

    from lsys.model.packed import PackedMicroBatch
    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    config = Config.model_validate(
        {
            "model": BASE | changes,
            "data": {"corpora": [{"path": "unused"}]},
            "train": dict(folder="unused", steps=2, batch_tokens=TOKENS, micro_batch_tokens=TOKENS, precision="fp32"),
        }
    )
    with process_groups(config.parallel, Launch()) as groups:
        model = Engine(config, groups).chunks[0].module
        layout = SequenceLayout.contiguous((TOKENS,), 1)
        tokens = torch.zeros(TOKENS, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, tokens, PackedMicroBatch(layout=layout, positions=layout.positions(0)))
    counts = counter.get_flop_counts()["Global"]
    single = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    return sum(p.numel() for p in model.parameters()), single


TOKENS = 2 * CHUNK


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_built_model_has_these_parameters_and_products(gloo, changes: dict) -> None:
    [(count, products)] = gloo(1, built, changes)
    model = Model(**(BASE | changes))
    assert sum(parameters(model).values()) == count
    forward = flops_per_token(model, TOKENS)
    expected = TOKENS * sum(value for part, value in forward.items() if not part.endswith("attention"))
    assert products == expected


def test_parameters_by_part() -> None:
    parts = parameters(Model(**BASE))  # LLLSL
    assert parts == {
        "embedding": 64 * 48,
        "softmax mixer": (6 + 2 * 2) * 10 * 48 + 48 * 60,
        "lightning mixer": 4 * (4 * 60 * 48 + 48 * 60),
        "mlp": 5 * (2 * 80 * 48 + 48 * 80),
        "norms": 11 * 48 + 2 * 10 + 4 * 60,
        "output": 0,
    }
    assert parameters(Model(**BASE, tied=False))["output"] == 64 * 48


def test_attention_is_counted_pair_by_pair() -> None:
    """Softmax: every (query, key) pair of a document costs 2 D for the score and 2 D for the value, in each head."""
    model, lengths = Model(**(BASE | dict(pattern="S"))), [5, 0, 1, 13]
    pairs = sum(1 for n in lengths for query in range(n) for _ in range(query + 1))
    total = flops_per_token(model, lengths)["softmax attention"] * sum(lengths)
    assert math.isclose(total, 5 * 6 * 4 * 10 * pairs, rel_tol=1e-12)


def test_a_window_caps_what_a_query_sees() -> None:
    model, lengths = Model(**(BASE | dict(pattern="WS", layers=3, window=4))), [5, 0, 1, 13]
    pairs = sum(min(query + 1, 4) for n in lengths for query in range(n))
    parts = flops_per_token(model, lengths)
    assert math.isclose(parts["window attention"] * sum(lengths), 2 * 6 * 4 * 10 * pairs, rel_tol=1e-12)
    assert parts["window projections"] == 2 * parts["softmax projections"]


def test_linear_attention_does_not_depend_on_lengths() -> None:
    model = Model(**(BASE | dict(pattern="L", linear=dict(heads=1, head_dim=128), layers=1)))
    assert (
        flops_per_token(model, 7)["lightning attention"]
        == flops_per_token(model, 70_000)["lightning attention"]
        == 98_304
    )


def test_each_layer_with_a_state() -> None:
    """8 value heads of width 5, 4 key heads of width 6, chunks of 64, by hand: a product of [a, b] and [b, c] is 2 a b c."""
    linear = dict(heads=8, head_dim=5, key_heads=4, key_dim=6, conv_width=3)

    def per_token(pattern: str, **more: object) -> float:
        model = Model(**(BASE | dict(pattern=pattern, layers=len(pattern), linear=linear | more)))
        (part,) = (v for k, v in flops_per_token(model, [3, 70]).items() if k.endswith("attention"))
        return part * 64

    update = read = 8 * 2 * 64 * 6 * 5  # [K, C] [C, V] and [C, K] [K, V]
    scores, values = 2 * 64 * 64 * 6, 8 * 2 * 64 * 64 * 5  # of one head; of all
    plain = update + read + 4 * scores + values
    assert per_token("L") == per_token("R") == plain
    assert per_token("G") == update + read + 8 * scores + values
    assert per_token("M") == plain + 64 * 2 * 3 * (8 * 5 + 2 * 4 * 6)
    corrections = 8 * (2 * 64 * 6 * 5 + scores + 2 * 64 * 64 * (6 + 5))
    assert per_token("D") == update + read + 8 * scores + values + corrections + 64 * 2 * 3 * (8 * 5 + 2 * 4 * 6)
    wider = 2 * update + 2 * read + 8 * scores + values
    assert per_token("LLL", lrpe="all") == 3 * wider and per_token("LLL", lrpe="first") == wider + 2 * plain


def test_training_is_three_forward_passes_and_recompute_is_apart() -> None:
    model = Model(**BASE)
    forward = flops_per_token(model, [100, 28])
    assert math.isclose(training_flops(model, [100, 28]), 3 * 128 * sum(forward.values()), rel_tol=1e-12)
    assert training_flops(model, 128) == training_flops(model, [128])
    assert training_flops(model, []) == 0
    assert recompute_flops_per_token(model, 128, "none") == 0
    attention = forward["softmax attention"] + forward["lightning attention"]
    assert recompute_flops_per_token(model, [100, 28], "selective") == attention
    full = recompute_flops_per_token(model, [100, 28], "full")
    assert math.isclose(full, sum(forward.values()) - forward["output"], rel_tol=1e-12)
    with pytest.raises(ValueError, match="there are none, selective, full"):
        recompute_flops_per_token(model, 1, "some")
    with pytest.raises(ValueError, match="hold no token"):
        flops_per_token(model, [0])


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A4000", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_by_name(name: str, bf16: float | None) -> None:
    assert gpu_peak(name, torch.bfloat16) == bf16
    assert gpu_peak(name, torch.float64) is None


def test_cpu_peak_is_what_products_reach() -> None:
    assert 1e8 < cpu_peak(torch.float32, size=256, seconds=0.05) < 1e14
    assert peak(torch.device("meta"), torch.float32) is None


def peaks(rank: int, world_size: int) -> float | None:
    return peak_of_ranks(torch.device("cpu"), "fp32")


def test_ranks_agree_on_the_sum_of_their_peaks(gloo) -> None:
    one, other = gloo(2, peaks)
    assert one == other and one > 1e8
