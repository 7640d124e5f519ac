"""Peak arithmetic of the machine: what MFU divides by."""

import time

import torch
import torch.distributed as dist

from lsys.parallel.gpus import of_device


def gpu_peak(name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of the GPU that torch calls `name`, or None if it or the dtype is not in the table."""
    gpu, precision = of_device(name), {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
    return gpu.peaks[precision] if gpu and precision else None


def cpu_peak(dtype: torch.dtype, size: int = 768, seconds: float = 0.25) -> float:
    """FLOP/s of the best of several square matrix products in this process, with its threads."""
    x = torch.randn(size, size).to(dtype)
    x @ x  # the first call sets the library up
    best, stop = float("inf"), time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        x @ x
        ended = time.perf_counter()
        best = min(best, ended - began)
        if ended > stop:
            return 2 * size**3 / best


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device: from the table for a GPU, measured for a CPU; None where it is unknown."""
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), dtype)
    return cpu_peak(dtype) if device.type == "cpu" else None


def peak_of_ranks(device: torch.device, precision: str) -> float | None:
    """Sum of all ranks' peaks, on every rank; None if one is unknown. All ranks of the default group call it together.

    CPU ranks measure at the same time, so those that share cores share their peak.

    Args:
        precision: `bf16` or `fp32`, as in `train.precision`.
    """
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if not dist.is_initialized():
        return peak(device, dtype)
    total = torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total)  # a barrier
    total.fill_(peak(device, dtype) or float("nan"))
    dist.all_reduce(total)
    return None if total.isnan() else float(total)
