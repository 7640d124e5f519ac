"""A whole training step in plain PyTorch: the model, its loss, AdamW, clipping and the schedule, written from their papers.

It imports nothing of lsys's and nothing of Megatron's: a fault that all of lsys's ranks share shows beside it. It is slow: every document
by itself, every pair of tokens or every token by itself. Parameters are a dict by the names that lsys's checkpoints give them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The model. One letter a layer in `mixers` (S, L, D, M) and in `channels` (F: SwiGLU; -: none), repeated over `layers`."""

    mixers: str
    channels: str
    layers: int
    heads: int
    groups: int
    head: int
    state_heads: int
    key_heads: int
    key: int
    value: int
    is_tied: bool
    qk_norm: bool
    rope_base: float = 10_000.0
    eps: float = 1e-6


@dataclass(frozen=True)
class Recipe:
    """The optimizer and its schedule of `steps` steps."""

    schedule: str
    peak: float
    least: float
    warmup: int
    decay: int
    steps: int
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    z_loss: float

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1."""
        if step <= self.warmup:
            return self.peak * step / self.warmup
        gone = step - 1  # the first step after the warm-up is at the peak
        if self.schedule == "constant":
            return self.peak
        if self.schedule == "cosine":
            angle = math.pi * (gone - self.warmup) / (self.steps - self.warmup)
            return self.least + (self.peak - self.least) * (1 + math.cos(angle)) / 2
        left = (self.steps - gone) / self.decay
        return self.least + (self.peak - self.least) * min(1.0, left)


# ---- layers: x [n, hidden] of one document -> [n, hidden]; w: the layer's own parameters


def norm(x: Tensor, eps: float, weight: Tensor | float = 1.0) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions: channels i and i + d/2 of [n, h, d] are a complex number that turns by base^(-2i/d) a token."""
    half = x.shape[-1] // 2
    rate = base ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * rate
    number = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angle)
    return torch.cat((number.real, number.imag), -1).to(x.dtype)


def pairwise(q: Tensor, k: Tensor, v: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """o_t = sum over s <= t of weigh(scores, is seen) v_s: q, k [n, H, d], v [n, H, e]."""
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    return torch.einsum("hts,she->the", weigh(torch.einsum("thd,shd->hts", q, k), seen), v)


def softmax(x: Tensor, w: Weights, m: Sizes, layer: int) -> Tensor:
    each = m.heads // m.groups
    grouped = (x @ w["in_proj.weight"].T).view(len(x), m.groups, each + 2, m.head)
    q, k, v = grouped[:, :, :each].flatten(1, 2), grouped[:, :, each], grouped[:, :, each + 1]
    if m.qk_norm:
        q, k = norm(q, m.eps, w["q_layernorm.weight"]), norm(k, m.eps, w["k_layernorm.weight"])
    q, k = turned(q, m.rope_base), turned(k, m.rope_base)
    k, v = (y.repeat_interleave(each, 1) for y in (k, v))

    def weigh(scores: Tensor, seen: Tensor) -> Tensor:
        return torch.softmax((scores / math.sqrt(m.head)).masked_fill(~seen, -math.inf), -1)

    return pairwise(q, k, v, weigh).flatten(1) @ w["out_proj.weight"].T


def parts(x: Tensor, w: Weights, m: Sizes, widths: Sequence[int]) -> list[Tensor]:
    """The projection, key head by key head: each part [n, key heads, width]."""
    return list((x @ w["in_proj.weight"].T).view(len(x), m.key_heads, sum(widths)).split(list(widths), -1))


def decayed(steps: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Scores times e^(sum of the log-decays of the tokens after s up to t): steps [n, H]."""
    until = steps.cumsum(0).T

    def weigh(scores: Tensor, seen: Tensor) -> Tensor:
        return scores * torch.exp((until[:, :, None] - until[:, None]).masked_fill(~seen, -math.inf))

    return weigh


def lightning(x: Tensor, w: Weights, m: Sizes, layer: int) -> Tensor:
    each = m.state_heads // m.key_heads
    q, k, v, gate = parts(x, w, m, (m.key, m.key, each * m.value, each * m.value))
    q, k = (F.silu(y).repeat_interleave(each, 1) for y in (q, k))
    v = F.silu(v).reshape(len(x), m.state_heads, m.value)
    slopes = 2.0 ** (-8 * torch.arange(1, m.state_heads + 1, dtype=x.dtype) / m.state_heads)
    rates = -slopes * (1 - layer / max(m.layers - 1, 1) + 1e-5)
    o = pairwise(q / math.sqrt(m.key), k, v, decayed(rates.expand(len(x), -1)))
    o = norm(o, m.eps).flatten(1) * w["out_norm.weight"]
    return (o * torch.sigmoid(gate.flatten(1))) @ w["out_proj.weight"].T


def convolved(x: Tensor, w: Weights) -> Tensor:
    """Each channel of [n, groups, C] over its last tokens, then SiLU."""
    weight, flat = w["conv.weight"], x.flatten(1)
    width = weight.shape[1]
    padded = torch.cat((flat.new_zeros(width - 1, flat.shape[1]), flat))
    moved = torch.stack([padded[i : i + len(x)] * weight[:, i] for i in range(width)])
    return F.silu(moved.sum(0) + w.get("conv.bias", 0.0)).view_as(x)


def step_sizes(raw: Tensor, w: Weights) -> tuple[Tensor, Tensor]:
    """Mamba's steps and log-decays: [n, H] each."""
    steps = torch.log1p(torch.exp(raw + w["decay.dt_bias"]))
    return steps, -torch.exp(w["decay.A_log"]) * steps


def mamba2(x: Tensor, w: Weights, m: Sizes, layer: int) -> Tensor:
    each = m.state_heads // m.key_heads
    z, xbc, raw = parts(x, w, m, (each * m.value, each * m.value + 2 * m.key, each))
    u, b, c = convolved(xbc, w).split([each * m.value, m.key, m.key], -1)
    u = u.reshape(len(x), m.state_heads, m.value)
    b, c = (y.repeat_interleave(each, 1) for y in (b, c))
    steps, decays = step_sizes(raw.reshape(len(x), -1), w)
    y = pairwise(c, b, steps[..., None] * u, decayed(decays)) + w["skip.D"][:, None] * u
    gated = y.reshape(z.shape) * F.silu(z)
    return (norm(gated, m.eps).flatten(1) * w["out_norm.weight"]) @ w["out_proj.weight"].T


def gated_delta(x: Tensor, w: Weights, m: Sizes, layer: int) -> Tensor:
    each = m.state_heads // m.key_heads
    qkv, gate, beta, raw = parts(x, w, m, (2 * m.key + each * m.value, each * m.value, each, each))
    q, k, v = convolved(qkv, w).split([m.key, m.key, each * m.value], -1)
    q, k = ((y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6)).repeat_interleave(each, 1) for y in (q, k))
    v = v.reshape(len(x), m.state_heads, m.value)
    beta = torch.sigmoid(beta.reshape(len(x), -1))
    decays = torch.exp(step_sizes(raw.reshape(len(x), -1), w)[1])
    state, outputs = x.new_zeros(m.state_heads, m.value, m.key), []
    for t in range(len(x)):
        state = state * decays[t, :, None, None]
        error = v[t] - torch.einsum("hek,hk->he", state, k[t])
        state = state + torch.einsum("h,he,hk->hek", beta[t], error, k[t])
        outputs.append(torch.einsum("hek,hk->he", state, q[t]) / math.sqrt(m.key))
    o = norm(torch.stack(outputs), m.eps).flatten(1) * w["out_norm.weight"]
    return (o * F.silu(gate.flatten(1))) @ w["out_proj.weight"].T


MIXERS = {"S": softmax, "L": lightning, "D": gated_delta, "M": mamba2}


def swiglu(x: Tensor, w: Weights) -> Tensor:
    gate, up = (x @ w["linear_fc1.weight"].T).chunk(2, -1)
    return (F.silu(gate) * up) @ w["linear_fc2.weight"].T


# ---- the whole


@dataclass(frozen=True)
class Batch:
    """A micro-batch: tokens, targets int64 [T]; mask [T], 1 where the target counts; lengths of its documents."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    lengths: Sequence[int]


@dataclass(frozen=True)
class Seen:
    """A step: cross-entropy and z-loss a token that counts, the norm of the gradients before clipping, the learning rate."""

    loss: float
    z_loss: float
    norm: float
    rate: float


class Training:
    """Steps of the plain model.

    Args:
        weights: by lsys's names; they are copied, in fp64.
    """

    def __init__(self, weights: Weights, sizes: Sizes, recipe: Recipe) -> None:
        self.sizes, self.recipe, self.step = sizes, recipe, 0
        self.weights = {name: value.double().clone().requires_grad_() for name, value in weights.items()}
        groups = [
            {"params": [w for w in self.weights.values() if w.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [w for w in self.weights.values() if w.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, eps=recipe.eps)

    def own(self, prefix: str) -> Weights:
        """The parameters below a name."""
        return {name[len(prefix) :]: value for name, value in self.weights.items() if name.startswith(prefix)}

    def logits(self, tokens: Tensor) -> Tensor:
        """Of one document: [n] -> [n, vocab]."""
        m, embedding = self.sizes, self.weights["embedding.word_embeddings.weight"]
        x = embedding[tokens]
        for layer in range(m.layers):
            w = self.own(f"decoder.layers.{layer}.")
            mixer = MIXERS[m.mixers[layer % len(m.mixers)]]
            inner = {n.removeprefix("self_attention."): p for n, p in w.items() if n.startswith("self_attention.")}
            x = x + mixer(norm(x, m.eps, w["input_layernorm.weight"]), inner, m, layer)
            if m.channels[layer % len(m.channels)] == "F":
                inner = {n.removeprefix("mlp."): p for n, p in w.items() if n.startswith("mlp.")}
                x = x + swiglu(norm(x, m.eps, w["pre_mlp_layernorm.weight"]), inner)
        x = norm(x, m.eps, self.weights["decoder.final_layernorm.weight"])
        return x @ (embedding if m.is_tied else self.weights["output_layer.weight"]).T

    def sums(self, batch: Batch) -> Tensor:
        """[cross-entropy, z-loss] of a micro-batch, summed over the targets that count."""

        def of_documents() -> Iterator[Tensor]:
            for tokens, targets, mask in zip(
                *(x.split(list(batch.lengths)) for x in (batch.tokens, batch.targets, batch.mask)), strict=True
            ):
                logits = self.logits(tokens)[mask > 0]
                log_z = torch.logsumexp(logits, -1)
                entropy = (log_z - logits.gather(-1, targets[mask > 0][:, None])[:, 0]).sum()
                yield torch.stack((entropy, self.recipe.z_loss * (log_z * log_z).sum()))

        return torch.stack([*of_documents()]).sum(0)

    def train(self, batches: Sequence[Batch]) -> Seen:
        """One step over micro-batches: the gradient of the mean over all of their targets that count."""
        self.step += 1
        counted = float(sum(batch.mask.sum() for batch in batches))
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            found = self.sums(batch) / counted
            found.sum().backward()
            total += found.detach()
        clip = self.recipe.clip or math.inf
        size = torch.nn.utils.clip_grad_norm_(self.weights.values(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Seen(float(total[0]), float(total[1]), float(size), self.recipe.rate(self.step))
