"""How Triton's kernels multiply numbers of fp32, which the interpreter does not show: it multiplies them exactly whatever they ask for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from lsys.kernels.linear_attention.gpu import compose
from lsys.kernels.linear_attention.gpu.passes import tiles
from lsys.kernels.linear_attention.gpu.tiles import sizes

KERNELS = Path(__file__).parents[2] / "kernels"
EXACT = {"tf32x3", "ieee"}  # of fp32, within its rounding; tf32 alone has ten bits


def products() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                yield f"{path.relative_to(KERNELS)}:{node.lineno}", node


def test_every_product_says_how() -> None:
    found = dict(products())
    assert len(found) > 30
    for where, call in found.items():
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert said.get("input_precision") == "PRECISION", where


def test_fp32_is_multiplied_as_fp32() -> None:
    x = torch.empty(16, 2, 64)
    assert tiles(x, x)["PRECISION"] in EXACT
    assert sizes(x, 64, 2, 32)["PRECISION"] in EXACT
    assert compose.PRECISION in EXACT
