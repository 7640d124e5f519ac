"""Peers of `bench/gpu.py`: flash-linear-attention's operations, PyTorch's attention and the package flash-attn.

A peer that is missing, or that refuses, is a note beside our own numbers.
"""

import importlib
import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.kernels.softmax_attention import attend_sequences, sequences

Attend = Callable[[], Tensor]

# flash-linear-attention 0.4 to 0.6. chunk_simple_gla has all scalar decays; its Lightning attention and retention call it.
FLA = {
    "none": ("simple_gla", "chunk_simple_gla"), "head": ("simple_gla", "chunk_simple_gla"),
    "token": ("simple_gla", "chunk_simple_gla"), "channel": ("gla", "chunk_gla"),
    "delta": ("delta_rule", "chunk_delta_rule"), "gated delta": ("gated_delta_rule", "chunk_gated_delta_rule"),
}  # fmt: skip


def said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"[:300]


def linear_peer(
    variant: str,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
    leaves: list[Tensor],
    do: Tensor,
) -> tuple[Attend | None, str]:
    """flash-linear-attention's operation on these inputs, or None, and a note. q, k, v [1, T, H, D]."""
    q, k, v, decay, beta = inputs
    if not v.is_cuda:
        return None, "flash-linear-attention needs a GPU"
    folder, name = FLA[variant]
    try:
        operation = getattr(importlib.import_module(f"fla.ops.{folder}"), name)
    except Exception as failure:  # whatever a foreign package does at its import
        return None, f"no flash-linear-attention ({said(failure)})"
    options: dict[str, Any] = {"head": {"g_gamma": decay}, "token": {"g": decay}, "channel": {"g": decay}}.get(
        variant, {}
    )
    options |= {"delta": {"beta": beta}, "gated delta": {"g": decay, "beta": beta}}.get(variant, {})

    def attend() -> Tensor:
        return operation(q, k, v, scale=k.shape[-1] ** -0.5, cu_seqlens=cu_seqlens, **options)[0]

    try:
        note = _forced(lambda: torch.autograd.grad(attend(), leaves, do))
        torch.cuda.synchronize()
    except Exception as failure:
        return None, f"flash-linear-attention: {said(failure)}"
    return attend, note


def _forced(work: Callable[[], Any]) -> str:
    """Runs it, even where flash-linear-attention refuses Hopper with a Triton whose results it found wrong.

    Its time is then still worth knowing: the kernels do the same amount of work. The note says so.
    """
    try:
        work()
        return ""
    except RuntimeError as refusal:
        if "incorrect results" not in str(refusal):
            raise
    importlib.import_module("fla.ops.common.chunk_o").IS_NVIDIA_HOPPER = False  # type: ignore[attr-defined]
    work()
    return "flash-linear-attention refuses this Triton on Hopper, as its gradients are wrong there; timed all the same"


# ---- softmax attention: q, k, v [T, H, D] -> [T, H, D], causal


def softmax_sides(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> tuple[dict[str, Attend], str]:
    """Ours, and each other that runs forward and backward; and a note on those that do not."""
    length = torch.tensor(lengths)
    tiles, scale = sequences(length, length, Mask()), q.shape[-1] ** -0.5
    sides: dict[str, Attend] = {"lsys": lambda: attend_sequences(q, k, v, tiles, scale=scale)[0]}
    notes = []
    for name, attend in _others(q, k, v, lengths).items():
        try:
            torch.autograd.grad(attend(), [q, k, v], torch.ones_like(q))
            if q.is_cuda:
                torch.cuda.synchronize()
            sides[name] = attend
        except Exception as failure:
            notes.append(f"{name}: {said(failure)}")
    return sides, "; ".join(notes)


def _others(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> dict[str, Attend]:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
    found: dict[str, Attend] = {}
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION") if q.is_cuda else ("MATH",):
        name = f"torch {backend.split('_')[0].lower()}"
        if len(lengths) == 1:
            found[name] = _dense(q, k, v, backend)
        else:
            found[f"{name}, jagged"] = _jagged(q, k, v, bounds, max(lengths), backend)
            found[f"{name}, each"] = _each(q, k, v, lengths, backend)
    if q.is_cuda:
        found["torch varlen"] = _varlen(q, k, v, bounds, max(lengths))
        found["flash-attn 2"] = _package("flash_attn", q, k, v, bounds, max(lengths))
        found["flash-attn 3"] = _package("flash_attn_interface", q, k, v, bounds, max(lengths))
    return found


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend() -> Tensor:
        a, b, c = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            o = F.scaled_dot_product_attention(a, b, c, is_causal=True)
        return o[0].transpose(0, 1)

    return attend


def _each(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], backend: str) -> Attend:
    """A call for each document."""

    def attend() -> Tensor:
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_dense(a, b, c, backend)() for a, b, c in parts])

    return attend


def _jagged(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, backend: str) -> Attend:
    """One call, over nested tensors."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    offsets = bounds.long()

    def attend() -> Tensor:
        make = torch.nested.nested_tensor_from_jagged
        a, b, c = (make(x, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            o = F.scaled_dot_product_attention(a, b, c, is_causal=True)
        return o.transpose(1, 2).values()

    return attend


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Attend:
    """PyTorch's own variable-length call, from 2.10 on."""

    def attend() -> Tensor:
        run = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        newer = "window_size" in inspect.signature(run).parameters
        options = {"window_size": (-1, 0)} if newer else {"is_causal": True}
        return run(q, k, v, bounds, bounds, longest, longest, **options)

    return attend


def _package(module: str, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Attend:
    def attend() -> Tensor:
        run = importlib.import_module(module).flash_attn_varlen_func
        o = run(q, k, v, bounds, bounds, longest, longest, causal=True)
        return o[0] if isinstance(o, tuple) else o

    return attend
