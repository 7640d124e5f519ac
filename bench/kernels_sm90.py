"""What every Triton kernel compiles to for Hopper, on a machine without a GPU: registers, spills, tensor cores.

    python bench/kernels_sm90.py                           # all families, writes docs/benchmarks/kernels-sm90.md
    python bench/kernels_sm90.py --family "delta rule"     # those whose names contain this, printed only

Host functions run forward and backward on CPU tensors under a stand-in for the driver; each kernel that they launch is
compiled for sm_90 instead and taken apart with Triton's own tools. Numbers that come out mean nothing. Exit status 1 if
a kernel spills registers, or if one with matrix products has no wgmma (`PLAIN` has none). TRITON_INTERPRET must be unset,
which is why tests run this in a process of its own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.common.tree import ROOT

REPORT = ROOT / "docs" / "benchmarks" / "kernels-sm90.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = 232448  # bytes a block may take on sm_90
TOKENS, HEADS, WIDTHS = 2048, 16, (128, 64)


class Call(NamedTuple):
    """A host call, of which all launches are compiled."""

    name: str
    run: Callable[[], object]


def linear_attention_calls(variant: str) -> Iterator[Call]:
    """Forward and backward of two segments with external state with incoming states, bf16, B1 H16, K = V of WIDTHS."""
    from lsys.kernels.linear_attention.chunked.chunks import Tokens
    from lsys.kernels.linear_attention.gpu import triton_segments

    for width in WIDTHS:

        def run(width: int = width) -> None:
            q, k, v = (torch.randn(TOKENS, HEADS, width).bfloat16().requires_grad_() for _ in range(3))
            shape = {"head": (HEADS,), "channel": (TOKENS, HEADS, width)}.get(variant, (TOKENS, HEADS))
            decay = None if variant in ("none", "delta") else torch.full(shape, -0.1, requires_grad=True)
            beta = torch.rand(TOKENS, HEADS).requires_grad_() if "delta" in variant else None
            state = torch.randn(2, HEADS, width, width, requires_grad=True)
            lengths = [TOKENS // 2] * 2
            parts = triton_segments(Tokens(q, k, v, decay, beta), lengths, [0, 1], width**-0.5)
            maps = parts.segment_map()
            o = parts.apply(maps, parts.intra(), state)
            ends = [x for x in (o, maps.state, maps.transition) if x is not None and x.requires_grad]
            torch.autograd.backward(ends, [torch.zeros_like(x) for x in ends])

        yield Call(f"K = V = {width}", run)


def compose_calls() -> Iterator[Call]:
    """Forward and backward over the maps of states with matrices, fp32, as ranks compose them: in one launch, and in blocks."""
    from lsys.kernels.linear_attention.gpu.compose import BLOCK, compose_matrices

    for width in WIDTHS:

        def run(width: int = width) -> None:
            for maps in (BLOCK, BLOCK + 1):
                update, transition = torch.randn(maps, 1, width, width), torch.randn(maps, 1, width, width)
                for reverse in (False, True):
                    compose_matrices(update, transition, [maps], update[:1], reverse=reverse)
                    compose_matrices(update, transition, [maps], reverse=reverse)

        yield Call(f"K = V = {width}", run)


def convolution_calls() -> Iterator[Call]:
    """Forward and backward of packed sequences with inputs before them, bf16, 2,048 channels, width 4."""
    from lsys.kernels.short_convolution.fused import convolution

    def run() -> None:
        x, weight = torch.randn(64, 2048).bfloat16().requires_grad_(), torch.randn(2048, 4).bfloat16().requires_grad_()
        before = torch.randn(2, 3, 2048).bfloat16().requires_grad_()
        for bias, activation in ((None, None), (weight[:, 0].detach(), "silu")):
            y = convolution(x, weight, bias, [32, 32], before, activation)
            y.backward(torch.zeros_like(y))

    yield Call("C = 2048, W = 4", run)


# One line a family. A call's launches are compiled once each, however many families share them.
FAMILIES: dict[str, Callable[[], Iterator[Call]]] = {
    "linear attention, no decay": lambda: linear_attention_calls("none"),
    "linear attention, decay per token": lambda: linear_attention_calls("token"),
    "linear attention, decay per channel": lambda: linear_attention_calls("channel"),
    "linear attention, gated delta rule": lambda: linear_attention_calls("gated delta"),
    "linear attention, maps of states": compose_calls,
    "short convolution": convolution_calls,
}

# Kernels without matrix products.
PLAIN = {"scan_kernel", "convolution_kernel", "convolution_gradients_kernel"}


class Resources(NamedTuple):
    """Resources of one compiled kernel. Sizes in bytes; stores and loads of spilled registers as ptxas counts them."""

    kernel: str
    flags: str
    call: str
    warps: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    wgmma: int
    mma: int
    tma: int

    @property
    def defects(self) -> list[str]:
        found = []
        if self.spill_stores or self.spill_loads:
            found.append(f"spills {self.spill_stores} bytes in stores and {self.spill_loads} in loads")
        if not self.wgmma and self.kernel not in PLAIN:
            found.append("has no wgmma")
        if self.shared > SHARED_MEMORY:
            found.append(f"takes {self.shared} bytes of shared memory; a block may take {SHARED_MEMORY}")
        return [f"{self.kernel} ({self.call}) {what}" for what in found]


class Hopper:
    """What Triton asks a driver for in order to compile, but not to launch."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return dict(max_shared_mem=SHARED_MEMORY, multiprocessor_count=132, warpSize=32)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda function, quantiles=None, **options: (function(), [1.0] * 3)[1]


def resources(kernel: Any, call: str) -> Resources:
    """Take a compiled kernel apart."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        target = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])
        assert target is not None

        def output(*command: str | Path, error: bool = False) -> str:
            done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
            return done.stderr if error else done.stdout

        options = ("-v", "--regAllocOptLevel=2", f"--gpu-name={target[1]}", ptx, "-o", f"{folder}/again.cubin")
        log = output(knobs.nvidia.ptxas_blackwell.path, *options, error=True)
        use = output(TOOLS / "cuobjdump", "-res-usage", cubin)
        sass = output(TOOLS / "nvdisasm", "-c", cubin)

    names = kernel.src.fn.arg_names

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise RuntimeError(f"the tools say nothing of {pattern!r} for {kernel.metadata.name}:\n{text}")
        return int(found[1])

    return Resources(
        kernel=kernel.metadata.name,
        flags=" ".join(names[path[0]] for path, value in kernel.src.constants.items() if value is True),
        call=call,
        warps=kernel.metadata.num_warps,
        registers=number(r"REG:(\d+)", use),
        stack=number(r"STACK:(\d+)", use),
        spill_stores=number(r"(\d+) bytes spill stores", log),
        spill_loads=number(r"(\d+) bytes spill loads", log),
        shared=kernel.metadata.shared,
        wgmma=sass.count("HGMMA"),
        mma=len(re.findall(r"\bHMMA", sass)),
        tma=sass.count("UTMALDG") + sass.count("UTMASTG"),
    )


def compiled(families: dict[str, Callable[[], Iterator[Call]]]) -> dict[str, list[Resources]]:
    """Every kernel that the calls of each family launch, in order, once."""
    caught: list[Any] = []
    launch = JITFunction.run

    def capture(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        caught.append(launch(self, *arguments, grid=grid, warmup=True, **options))
        return caught[-1]

    driver.set_active(Hopper())  # type: ignore[arg-type]
    JITFunction.run = capture  # type: ignore[method-assign]
    seen: set[str] = set()
    found: dict[str, list[Resources]] = {}
    try:
        for family, calls in families.items():
            rows = found.setdefault(family, [])
            for call in calls():
                call.run()
                for kernel in caught:
                    if kernel.hash not in seen:
                        seen.add(kernel.hash)
                        rows.append(resources(kernel, call.name))
                        print(family, rows[-1], flush=True, file=sys.stderr)
                caught.clear()
    finally:
        JITFunction.run = launch  # type: ignore[method-assign]
    return found


def table(found: dict[str, list[Resources]]) -> str:
    """Markdown."""
    head: tuple[str, ...] = (
        "kernel",
        "flags",
        "call",
        "warps",
        "registers",
        "stack",
        "spill stores",
        "spill loads",
        "shared memory",
    )
    head = (*head, "wgmma", "mma", "tma")
    lines = []
    for family, rows in found.items():
        lines += [f"## {family[0].upper()}{family[1:]}", "", f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * 9]
        lines += [f"| {' | '.join(str(x) for x in row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


INTRODUCTION = f"""# Triton kernels, compiled for sm_90

`python bench/kernels_sm90.py`, on a machine without a GPU; Triton {triton.__version__}. bf16, {TOKENS:,} tokens in two
segments, {HEADS} heads; sizes in bytes, instructions counted as they stand in the code. Flags: what of a kernel was
compiled. One that two families share is listed with the first. wgmma: the tensor cores' instruction for whole warp groups; mma: the older one for a warp;
tma: bulk copies (kernels here load through pointers, which the compiler turns into asynchronous copies of its own).
The command fails on any spill, and on a kernel with matrix products but no wgmma.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default=None, help="only the families whose names contain this; writes no report")
    wanted = parser.parse_args().family
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted; unset it")
    families = {name: calls for name, calls in FAMILIES.items() if wanted is None or wanted in name}
    if not families:
        parser.error(f"no family's name contains {wanted!r}; there are: {', '.join(FAMILIES)}")
    found = compiled(families)
    text = table(found)
    print(text)
    if wanted is None:
        REPORT.write_text(INTRODUCTION + text)
    defects = [defect for rows in found.values() for row in rows for defect in row.defects]
    print("\n".join(defects), file=sys.stderr)
    return 1 if defects or not all(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
