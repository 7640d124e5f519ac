"""Whether the Triton kernels compute a call, and which do. Imports Triton only when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from lsys.kernels.linear_attention.chunked.chunks import Tokens

WIDEST = 256  # columns or rows of a state
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_refusal(tokens: Tokens) -> str | None:
    """Why not, in words that follow the backend's name; None if they do."""
    _, k, v, log_decay, beta = tokens
    keys, columns = k.shape[2], v.shape[2]
    if v.dtype not in DTYPES:
        return f"takes fp32, bf16 and fp16, not {v.dtype}"
    if not (0 < keys <= WIDEST and 0 < columns <= WIDEST):
        return f"takes K and V of 1 to {WIDEST}, not K = {keys}, V = {columns}"
    if beta is not None and log_decay is not None and log_decay.dim() == 3:
        return "has no decay per key channel with the delta rule"
    if v.device.type not in ("cuda", "cpu"):
        return f"runs on CUDA, not on {v.device.type}"
    if find_spec("triton") is None:
        return "needs Triton: pip install 'lsys[triton]'"
    if v.device.type == "cpu" and not _interpreted():
        return "runs on CUDA, and on CPU only interpreted, with TRITON_INTERPRET=1 set before the start"
    return None


def _interpreted() -> bool:
    """What the kernels are, rather than what the environment says: that was read when they were imported."""
    from triton.runtime.jit import JITFunction

    from lsys.kernels.linear_attention.gpu.scan import scan_kernel

    return not isinstance(scan_kernel, JITFunction)


def triton_segments(tokens: Tokens, lengths: Sequence[int], external: Sequence[int], scale: float) -> Any:
    """The two phases. See `lsys.kernels.linear_attention.segments`."""
    if tokens.beta is not None:
        from lsys.kernels.linear_attention.gpu.delta.segments import DeltaTritonSegments

        return DeltaTritonSegments(tokens, lengths, external, scale)
    from lsys.kernels.linear_attention.gpu.segments import TritonSegments

    return TritonSegments(tokens, lengths, external, scale)
