"""As `test_linear_attention_forgetting`, in Triton, interpreted."""

from typing import Any

import pytest
import torch
from support import forgetting
from support.forgetting import wrong
from support.linear_kernels import VARIANTS

pytest.importorskip("triton")

GATED = [variant for variant in VARIANTS if not variant.endswith("none") and variant != "delta channel"]
SHORT = (70, 33, 20)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name in ("token", "delta token") else pytest.mark.slow) for name in GATED],
)
@pytest.mark.parametrize("way", ["whole", pytest.param("two_phases", marks=pytest.mark.slow)])
def test_in_triton(interpreter: Any, variant: str, way: str) -> None:
    found = interpreter(wrong, way, "triton", variant, SHORT)
    if variant == "head":  # a sum over all tokens of what are differences of sums: as precise without gates that forget
        assert found.pop("d decay", 0.0) < 5e-5
    assert found == {}


def nan_in_triton(variant: str) -> dict[str, bool]:
    """By name, whether any of it is finite where a log-decay that is NaN has its part: of token 70 of 130, past the checks of the CPU."""
    from lsys.kernels.linear_attention.chunked.chunks import Tokens
    from lsys.kernels.linear_attention.gpu import triton_segments

    (q, k, v, g, beta, _), _ = forgetting.leaves_of(variant, (130,))
    g[70] = torch.nan
    k.requires_grad_(), v.requires_grad_()
    parts = triton_segments(Tokens(q, k, v, g, beta), [100, 30], [0], 1.0)
    o, state = parts.intra(), parts.segment_map().state[0]
    found = {"o": o[70:100], "state": state}
    for of, loss in (("o", o[99]), ("the state", state)):
        dk, dv = torch.autograd.grad(loss.sum(), (k, v), retain_graph=True)
        for name, d in (("dk", dk), ("dv", dv)):
            found |= {f"{name} of {of}, in its chunk": d[64:70], f"{name} of {of}, before": d[:64]}
    return {name: bool(x.isfinite().any()) for name, x in found.items()}


@pytest.mark.parametrize("variant", ["token", "channel", "delta token"])
def test_a_gate_that_is_nan_is_not_taken_for_one_that_forgets(interpreter: Any, variant: str) -> None:
    """On a GPU nothing looks at the values before. What has the gate as a factor is as it is, forward and backward."""
    assert not {name for name, any_is_finite in interpreter(nan_in_triton, variant).items() if any_is_finite}
