"""Variable-length flash kernels for CUDA, half precision: PyTorch's own, and the flash-attn package's."""

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lsys.kernels.softmax_attention.varlen import Launch, Varlen

_MAX_WIDTH = 256
_OLDEST = (2, 7)  # flash-attn's first release with these signatures


def _obstacle(q: Tensor) -> str | None:
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bfloat16 or float16, not {q.dtype}"
    return None if q.shape[-1] <= _MAX_WIDTH else f"head width {q.shape[-1]} is over {_MAX_WIDTH}"


def _aten(q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_shape(launch), return_debug_mask=False, **_window(launch), scale=scale
    )
    return o, lse


def _aten_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, launch: Launch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the kernel reads neither random state; it wants the tensors all the same.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        do.contiguous(), q, k, v, o, lse, *_shape(launch), state, unused, **_window(launch), scale=scale
    )


def _package(q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
    run = _interface()._flash_attn_varlen_forward
    *bounds, dropout, causal = _shape(launch)
    o, lse, *_ = run(q, k, v, *bounds, dropout, scale, causal, **_window(launch))
    return o, lse


def _package_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, launch: Launch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    run = _interface()._flash_attn_varlen_backward
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    *bounds, dropout, causal = _shape(launch)
    options = {"softcap": 0.0, "alibi_slopes": None, "deterministic": torch.are_deterministic_algorithms_enabled()}
    run(do, q, k, v, o, lse, *grads, *bounds, dropout, scale, causal, **_window(launch), **options)
    return grads


def _shape(launch: Launch) -> tuple[Any, ...]:
    """Sequence bounds, longest sequences, dropout, and whether the band is the plain causal one."""
    causal = launch.left < 0 and launch.right == 0
    return launch.bounds_q, launch.bounds_k, launch.max_q, launch.max_k, 0.0, causal


def _window(launch: Launch) -> dict[str, int]:
    return {"window_size_left": launch.left, "window_size_right": launch.right}


def _package_obstacle(q: Tensor) -> str | None:
    return _obstacle(q) or _missing()


@lru_cache
def _missing() -> str | None:
    """Why the package cannot be used."""
    try:
        version = importlib.import_module("flash_attn").__version__
        _interface()
    except (ImportError, AttributeError) as error:
        return f"no usable package flash-attn ({error})"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return f"flash-attn {version} is older than {'.'.join(map(str, _OLDEST))}"
    return None


def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


ATEN = Varlen(_obstacle, _aten, _aten_backward)
PACKAGE = Varlen(_package_obstacle, _package, _package_backward)
