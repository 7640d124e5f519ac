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


def nan_in_triton(variant: str) -> list[bool]:
    """Whether outputs before and from the fifth token on are finite, of a log-decay of it that is not; past the checks of the CPU."""
    from lsys.kernels.linear_attention.chunked.chunks import Tokens
    from lsys.kernels.linear_attention.gpu import triton_segments

    (q, k, v, g, beta, _), _ = forgetting.leaves_of(variant, (20,))
    g[5] = torch.nan
    o = triton_segments(Tokens(q, k, v, g, beta), [20], [], 1.0).intra()
    return [bool(o[:5].isfinite().all()), bool(o[5:].isfinite().any())]


@pytest.mark.parametrize("variant", ["token", "channel", "delta token"])
def test_a_gate_that_is_nan_is_not_taken_for_one_that_forgets(interpreter: Any, variant: str) -> None:
    """On a GPU nothing looks at the values before."""
    assert not interpreter(nan_in_triton, variant)[1]
