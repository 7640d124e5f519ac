"""The definition: dense scores, one mask. Memory n x m for each tile; any device and dtype."""

import torch
from torch import Tensor

from lsys.kernels.softmax_attention.tile import Tile, Tiles


def obstacle(q: Tensor) -> str | None:
    """Why this backend cannot take q; None if it can."""
    return None if q.is_floating_point() else f"{q.dtype} is no floating-point type"


def plan(tiles: Tiles, q: Tensor) -> list[Tile]:
    """The launches that compute the tiles."""
    return list(tiles.trimmed())


def forward(tile: Tile, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o [n, H, D] and lse [n, H] of the tile's queries over its keys."""
    scores = _scores(tile, q, k, scale)
    lse = scores.logsumexp(-1)
    o = torch.einsum("qhgk,khd->qhgd", (scores - lse.unsqueeze(-1)).exp(), _wide(v[tile.k]))
    return o.flatten(1, 2), lse.flatten(1, 2)  # [n, H_kv, H / H_kv, ...] -> [n, H, ...]


def backward(
    tile: Tile, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The tile's share of dq [n, H, D], dk and dv [m, H_kv, D], given o and lse over all keys."""
    groups = (k.shape[1], -1)  # [n, H, ...] -> [n, H_kv, H / H_kv, ...]
    q_, k_, v_, do_, o_ = (_wide(x) for x in (q[tile.q], k[tile.k], v[tile.k], do[tile.q], o[tile.q]))
    q_, do_, delta = (x.unflatten(1, groups) for x in (q_, do_, (do_ * o_).sum(-1, keepdim=True)))
    p = (_scores(tile, q, k, scale) - lse[tile.q].unflatten(1, groups).unsqueeze(-1)).exp()
    ds = p * (torch.einsum("qhgd,khd->qhgk", do_, v_) - delta) * scale
    dq = torch.einsum("qhgk,khd->qhgd", ds, k_).flatten(1, 2)
    return dq, torch.einsum("qhgk,qhgd->khd", ds, q_), torch.einsum("qhgk,qhgd->khd", p, do_)


def _scores(tile: Tile, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q k^T where the band lets see, else -inf: [n, H_kv, H / H_kv, m]."""
    queries, keys = _wide(q[tile.q]).unflatten(1, (k.shape[1], -1)), _wide(k[tile.k])
    scores = torch.einsum("qhgd,khd->qhgk", queries, keys) * scale
    i = torch.arange(len(queries), device=q.device)[:, None, None, None]
    j = torch.arange(len(keys), device=q.device)
    if tile.first is not None:
        scores = scores.masked_fill(j < i + tile.first, -torch.inf)
    if tile.last is not None:
        scores = scores.masked_fill(j > i + tile.last, -torch.inf)
    return scores


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
