"""The layers with a state as their papers define them, token by token or pair by pair, head by head: no speed, no packing.

Each takes x [n, hidden] of one document, the whole weights by name, the model's configuration and the number of the layer from 0,
and gives [n, hidden].
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def heads_of(x: Tensor, w: Weights, m: Any, widths: list[int]) -> list[Tensor]:
    """The parts of the projection, each [n, key heads, width]."""
    return list((x @ w["in_proj.weight"].T).view(len(x), m.linear_key_heads, sum(widths)).split(widths, -1))


def sizes(m: Any) -> tuple[int, int, int, int]:
    """Value heads, key heads, channels of keys and of values."""
    return m.linear_heads, m.linear_key_heads, m.linear_key_width, m.linear_head_width


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def lightning(x: Tensor, w: Weights, m: Any, layer: int) -> Tensor:
    heads, keys, dk, dv = sizes(m)
    n = heads // keys
    q, k, v, gate = heads_of(x, w, m, [dk, dk, n * dv, n * dv])
    q, k, v = F.silu(q), F.silu(k), F.silu(v).reshape(len(x), heads, dv)
    phases = (
        m.mixers.lightning.lrpe == "all" or m.mixers.lightning.lrpe == "first" and "lightning" not in m.kinds[:layer]
    )
    o = torch.zeros(len(x), heads, dv, dtype=x.dtype)
    for h in range(heads):
        g = h // n
        rate = (
            2 ** (-8 * (h + 1) / heads) * (1 - layer / max(m.layers - 1, 1) + 1e-5) if m.mixers.lightning.decay else 0
        )
        rate = float(torch.tensor(rate, dtype=torch.float64).float())  # the model keeps it in fp32
        theta = torch.tensor([10000 ** (-2 * (g * dk + i) / (keys * dk)) for i in range(dk)], dtype=x.dtype)
        for t in range(len(x)):
            for s in range(t + 1):
                turn = torch.cos(theta * (t - s)) if phases else 1
                o[t, h] += (q[t, g] * k[s, g] * turn).sum() / math.sqrt(dk) * math.exp(-rate * (t - s)) * v[s, h]
    o = rms(o, m.norm_eps)
    if m.mixers.lightning.norm == "head":
        o = o * w["out_norm.weight"].view(heads, dv)
    return (o.flatten(1) * torch.sigmoid(gate.reshape(len(x), -1))) @ w["out_proj.weight"].T


def retention(x: Tensor, w: Weights, m: Any, layer: int) -> Tensor:
    heads, keys, dk, dv = sizes(m)
    n = heads // keys
    q, k, v, gate = heads_of(x, w, m, [dk, dk, n * dv, n * dv])
    theta = m.rope_base ** (-torch.arange(0, dk, 2, dtype=torch.float64) / dk)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * theta
    # Channel i and channel i + dk / 2 are the real and imaginary part of a number that turns with the position.
    q, k = (torch.complex(y[..., : dk // 2], y[..., dk // 2 :]) * torch.exp(1j * angle) for y in (q, k))
    v = v.reshape(len(x), heads, dv)
    o = torch.zeros_like(v)
    for h in range(heads):
        gamma = 1 - 2.0 ** (-5 - h)
        for t in range(len(x)):
            for s in range(t + 1):
                score = (q[t, h // n] * k[s, h // n].conj()).sum().real / math.sqrt(dk)
                o[t, h] += gamma ** (t - s) * score * v[s, h]
    o = F.group_norm(o.flatten(1), heads, eps=m.norm_eps)
    return (o * F.silu(gate.reshape(len(x), -1))) @ w["out_proj.weight"].T


def gated_linear(x: Tensor, w: Weights, m: Any, layer: int) -> Tensor:
    heads, keys, dk, dv = sizes(m)
    n = heads // keys
    q, k, v, gate = heads_of(x, w, m, [dk, dk, n * dv, n * dv])
    v = v.reshape(len(x), heads, dv)
    logits = x @ w["decay_in.weight"].T @ w["decay_out.weight"].T + w["decay_out.bias"]
    alpha = (torch.sigmoid(logits) ** (1 / 16)).view(len(x), keys, dk)
    o = torch.zeros_like(v)
    for h in range(heads):
        state = torch.zeros(dk, dv, dtype=x.dtype)
        for t in range(len(x)):
            state = torch.diag(alpha[t, h // n]) @ state + torch.outer(k[t, h // n], v[t, h])
            o[t, h] = q[t, h // n] / math.sqrt(dk) @ state
    o = rms(o, m.norm_eps) * w["out_norm.weight"].view(heads, dv)
    return (o.flatten(1) * F.silu(gate.reshape(len(x), -1))) @ w["out_proj.weight"].T


def convolved(x: Tensor, w: Weights) -> Tensor:
    """[n, groups, C] -> the same, each channel convolved by torch, then SiLU."""
    weight, channels = w["conv.weight"], x.flatten(1).T
    padded = F.pad(channels, (weight.shape[1] - 1, 0))[None]
    return F.silu(F.conv1d(padded, weight[:, None], w.get("conv.bias"), groups=len(weight))[0]).T.view_as(x)


def mamba2(x: Tensor, w: Weights, m: Any, layer: int) -> Tensor:
    heads, groups, states, dim = sizes(m)
    n = heads // groups
    z, xbc, dt = heads_of(x, w, m, [n * dim, n * dim + 2 * states, n])
    u, b, c = convolved(xbc, w).split([n * dim, states, states], -1)
    u = u.reshape(len(x), heads, dim)
    dt = torch.log(1 + torch.exp(dt.reshape(len(x), heads) + w["decay.dt_bias"]))
    a = -torch.exp(w["decay.A_log"])
    y = torch.zeros_like(u)
    for h in range(heads):
        state = torch.zeros(dim, states, dtype=x.dtype)
        for t in range(len(x)):
            state = torch.exp(dt[t, h] * a[h]) * state + dt[t, h] * torch.outer(u[t, h], b[t, h // n])
            y[t, h] = state @ c[t, h // n] + w["skip.D"][h] * u[t, h]
    y = rms(y.view(len(x), groups, n * dim) * F.silu(z), m.norm_eps).flatten(1) * w["out_norm.weight"]
    return y @ w["out_proj.weight"].T


def gated_delta(x: Tensor, w: Weights, m: Any, layer: int) -> Tensor:
    heads, keys, dk, dv = sizes(m)
    n = heads // keys
    qkv, gate, beta, raw = heads_of(x, w, m, [2 * dk + n * dv, n * dv, n, n])
    q, k, v = convolved(qkv, w).split([dk, dk, n * dv], -1)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v = v.reshape(len(x), heads, dv)
    beta = (2 if m.mixers.gated_delta.negative_eigenvalues else 1) * torch.sigmoid(beta.reshape(len(x), heads))
    dt = torch.log(1 + torch.exp(raw.reshape(len(x), heads) + w["decay.dt_bias"]))
    alpha = torch.exp(-torch.exp(w["decay.A_log"]) * dt)
    o = torch.zeros_like(v)
    for h in range(heads):
        state = torch.zeros(dv, dk, dtype=x.dtype)  # the paper's S, from keys to values
        for t in range(len(x)):
            key = k[t, h // n]
            state = state @ (alpha[t, h] * (torch.eye(dk) - beta[t, h] * torch.outer(key, key)).to(x.dtype))
            state = state + beta[t, h] * torch.outer(v[t, h], key)
            o[t, h] = state @ q[t, h // n] / math.sqrt(dk)
    o = rms(o, m.norm_eps) * w["out_norm.weight"].view(heads, dv)
    return (o.flatten(1) * F.silu(gate.reshape(len(x), -1))) @ w["out_proj.weight"].T


def delta_net(x: Tensor, w: Weights, m: Any, layer: int) -> Tensor:
    heads, keys, dk, dv = sizes(m)
    n = heads // keys
    qkv, beta = heads_of(x, w, m, [2 * dk + n * dv, n])
    q, k, v = convolved(qkv, w).split([dk, dk, n * dv], -1)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v, beta = v.reshape(len(x), heads, dv), torch.sigmoid(beta.reshape(len(x), heads))
    o = torch.zeros_like(v)
    for h in range(heads):
        state = torch.zeros(dv, dk, dtype=x.dtype)
        for t in range(len(x)):
            key = k[t, h // n]
            old = state @ key
            new = beta[t, h] * v[t, h] + (1 - beta[t, h]) * old  # the paper's update of a key's value
            state = state - torch.outer(old, key) + torch.outer(new, key)
            o[t, h] = state @ q[t, h // n] / math.sqrt(dk)
    return (rms(o, m.norm_eps) * w["out_norm.weight"].view(heads, dv)).flatten(1) @ w["out_proj.weight"].T


def kimi_delta(x: Tensor, w: Weights, m: Any, layer: int) -> Tensor:
    heads, keys, dk, dv = sizes(m)
    n = heads // keys
    qkv, beta = heads_of(x, w, m, [2 * dk + n * dv, n])
    q, k, v = convolved(qkv, w).split([dk, dk, n * dv], -1)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    v, beta = v.reshape(len(x), heads, dv), torch.sigmoid(beta.reshape(len(x), heads))
    steps = x @ w["decay_in.weight"].T @ w["decay_out.weight"].T + w["decay.dt_bias"]
    steps = torch.log(1 + torch.exp(steps)).view(len(x), heads, dk)
    alpha = torch.exp(-torch.exp(w["decay.A_log"])[:, None] * steps)
    o = torch.zeros_like(v)
    for h in range(heads):
        state = torch.zeros(dk, dv, dtype=x.dtype)
        for t in range(len(x)):
            key = k[t, h // n]
            erase = torch.eye(dk, dtype=x.dtype) - beta[t, h] * torch.outer(key, key)
            state = erase @ torch.diag(alpha[t, h]) @ state + beta[t, h] * torch.outer(key, v[t, h])
            o[t, h] = state.T @ (q[t, h // n] / math.sqrt(dk))
    gate = torch.sigmoid(x @ w["gate_in.weight"].T @ w["gate_out.weight"].T)
    o = rms(o, m.norm_eps) * w["out_norm.weight"].view(heads, dv)
    return (o.flatten(1) * gate) @ w["out_proj.weight"].T


LAYERS = {
    "kimi_delta": kimi_delta,
    "delta_net": delta_net,
    "lightning": lightning,
    "retention": retention,
    "gla": gated_linear,
    "mamba2": mamba2,
    "gated_delta": gated_delta,
}  # by the names of the registry
