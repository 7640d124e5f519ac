"""What linear attention refuses, in the words of its public functions."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from lsys.kernels.not_finite import NotFiniteError

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function, inside which no product is made in half precision that was not asked for: states over many tokens would be rounded at each."""

    @wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return precise


def check_tensors(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> None:
    """q, k [T, H_k, K], v [T, H, V], log_decay None, [H], [T, H] or [T, H, K], beta None or [T, H].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; on CPU also values that no variant has.
    """
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape; got {[*q.shape]} and {[*k.shape]}")
    if k.shape[1] == 0 or v.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} key heads do not divide {v.shape[1]} value heads")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share dtype and device; got {found}")
    tokens, heads = v.shape[:2]
    shapes = ([heads], [tokens, heads], [tokens, heads, k.shape[2]])
    if log_decay is not None and [*log_decay.shape] not in shapes:
        offered = ", ".join(
            f"{of}, {shape}" for of, shape in zip(("per head", "token", "key channel"), shapes, strict=True)
        )
        raise ValueError(f"log_decay is {[*log_decay.shape]}; offered are {offered}")
    if beta is not None and [*beta.shape] != [tokens, heads]:
        raise ValueError(f"beta is {[*beta.shape]}; it is per token and head, {[tokens, heads]}")
    if v.device.type == "cpu":  # elsewhere the checks would stall the stream
        _check_values(q, k, v, log_decay, beta)


def _check_values(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta)):
        # A sum is cheaper than a look at every number, and NaN in it says that there may be one.
        if x is not None and x.sum().isnan() and x.isnan().any():
            at = x.isnan().nonzero()[0].tolist()
            raise NotFiniteError(
                f"{name} has NaN, first at {at}; linear attention would spread it over the rest of its document"
            )
    if log_decay is not None and log_decay.numel():
        least, most = log_decay.aminmax()
        if most > 0:
            raise ValueError(f"log_decay reaches {most:.3g}; a decay has a logarithm of at most 0")
        if least == -torch.inf:
            raise ValueError("log_decay has -inf; to forget all, give a large finite number: differences are taken")
    if beta is not None and beta.numel() and not (0 <= beta.min() and beta.max() <= 2):
        raise ValueError(f"beta goes from {beta.min():.3g} to {beta.max():.3g}; it lies in [0, 2]: beyond, states grow")


def sequence_lengths(cu_seqlens: Tensor, batch: int, tokens: int) -> list[int]:
    """The lengths of packed sequences, checked."""
    if batch != 1:
        raise ValueError(f"cu_seqlens packs sequences along T and needs B = 1; got B = {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens is [N + 1] with N >= 0; got {[*cu_seqlens.shape]}")
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens goes from {bounds[0]} to {bounds[-1]}; it must go from 0 to T = {tokens}")
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"cu_seqlens must not decrease; it does from {bounds[at]} to {bounds[at + 1]}")
    return lengths


def check_direction(causal: bool, initial_state: Tensor | None, final: bool) -> None:
    """Both directions have no state before or after: each comes from its own end."""
    if not causal and (initial_state is not None or final):
        given = "initial_state" if initial_state is not None else "output_final_state"
        raise ValueError(f"{given} needs causal=True: with causal=False states come from both ends of a document")
