"""Gates that forget everything, for each head, token or channel: output and gradients are those of the recurrence in fp64."""

import pytest
from support.forgetting import wrong
from support.linear_kernels import VARIANTS

GATED = [variant for variant in VARIANTS if not variant.endswith("none")]
PACK = (100, 66, 140)


@pytest.mark.parametrize("variant", GATED)
def test_in_chunks_and_by_the_definition(variant: str) -> None:
    for backend in ("reference", "chunked"):
        for way in ("whole", "two_phases"):
            assert wrong(way, backend, variant, PACK) == {}, (backend, way)


@pytest.mark.parametrize("variant", GATED)
def test_token_by_token(variant: str) -> None:
    assert wrong("steps", "auto", variant, (48,)) == {}
