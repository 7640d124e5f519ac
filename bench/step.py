"""Tokens per second of training steps: lsys (Megatron's layers, DDP, distributed optimizer) beside a plain PyTorch model.

Both have the same shapes, arithmetic, documents, optimizer and clipping, in one process, taking turns step by step.

    OMP_NUM_THREADS=2 python bench/step.py configs/quickstart.yaml --steps 20
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsys.config.load import load
from lsys.config.model import Model
from lsys.config.overrides import parse_overrides
from lsys.config.schema import Config
from lsys.data.corpus import Corpus
from lsys.data.plan import Planner, RankBatch
from lsys.data.stream import TokenStream
from lsys.kernels.linear_attention import linear_attention
from lsys.mixers.dense import Dense
from lsys.mixers.lightning import Lightning
from lsys.mixers.softmax import Softmax
from lsys.observe.flops import parameters
from lsys.runtime.environment import Launch
from lsys.runtime.groups import process_groups


class PlainLayer(nn.Module):
    """One layer of the hybrid model without Megatron, tensor parallelism or a sequence axis."""

    decay: Tensor  # a buffer

    def __init__(self, has_state: bool, index: int, model: Model) -> None:
        super().__init__()
        self.has_state, self.model = has_state, model
        if not has_state:
            width, inner = model.heads * model.head_width, (model.heads + 2 * model.kv_heads) * model.head_width
            self.norm_q, self.norm_k = (
                nn.RMSNorm(model.head_width, model.norm_eps),
                nn.RMSNorm(model.head_width, model.norm_eps),
            )
        else:
            width = model.linear_heads * model.linear_head_width
            inner = 4 * width
            self.out_norm = nn.Parameter(torch.ones(model.linear_heads, model.linear_head_width))
            slopes = 2.0 ** (-8 * torch.arange(1, model.linear_heads + 1) / model.linear_heads)
            self.register_buffer("decay", -slopes * (1 - index / max(model.layers - 1, 1) + 1e-5))
        self.norm, self.mlp_norm = nn.RMSNorm(model.hidden, model.norm_eps), nn.RMSNorm(model.hidden, model.norm_eps)
        self.into, self.out = nn.Linear(model.hidden, inner, bias=False), nn.Linear(width, model.hidden, bias=False)
        self.up = nn.Linear(model.hidden, 2 * model.ffn_width, bias=False)
        self.down = nn.Linear(model.ffn_width, model.hidden, bias=False)

    def forward(self, x: Tensor, batch: SimpleNamespace) -> Tensor:
        projected = self.into(self.norm(x))
        x = x + self.out(self.linear(projected, batch) if self.has_state else self.softmax(projected, batch))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def softmax(self, projected: Tensor, batch: SimpleNamespace) -> Tensor:
        m, tokens = self.model, len(projected)
        q, k, v = projected.view(tokens, m.kv_heads, -1, m.head_width).split((m.heads // m.kv_heads, 1, 1), 2)
        q, k, v = self.norm_q(q).flatten(1, 2), self.norm_k(k).flatten(1, 2), v.flatten(1, 2)
        q, k = rotate(q, batch.cos, batch.sin), rotate(k, batch.cos, batch.sin)
        parts = []
        for a, b, c in zip(*(t.split(batch.lengths) for t in (q, k, v)), strict=True):
            a, b, c = (t.transpose(0, 1)[None] for t in (a, b, c))  # [1, H, n, D]
            parts.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(parts).reshape(tokens, -1)

    def linear(self, projected: Tensor, batch: SimpleNamespace) -> Tensor:
        m, tokens = self.model, len(projected)
        qkv, gate = projected.view(tokens, m.linear_heads, 4, m.linear_head_width).split((3, 1), 2)
        q, k, v = (t[None] for t in F.silu(qkv).unbind(2))
        decay = self.decay if m.mixers.lightning.decay else None
        o, _ = linear_attention(q, k, v, decay, cu_seqlens=batch.cu_seqlens)
        o = F.rms_norm(o[0], (m.linear_head_width,), None, m.norm_eps) * self.out_norm
        return (o * torch.sigmoid(gate.squeeze(2))).reshape(tokens, -1)


def different(model: Model) -> Iterator[str]:
    """What of a model the plain one has not, beside what its parameters show."""
    yield from (f"{key} layers" for key in model.cards if key not in (Softmax.name, Lightning.name))
    yield from (f"{key} channels" for key in model.channel_cards if key != Dense.name)
    for card in (*model.cards.values(), *model.channel_cards.values()):
        for key in type(card.own).model_fields:
            value = getattr(card.own, key)
            if value != getattr(card.Options(), key) and (card.key, key) != (Lightning.name, "decay"):
                yield f"model.mixers.{card.key}.{key} {value}"


class PlainModel(nn.Module):
    """The whole model, of softmax and Lightning layers with SwiGLU.

    Raises:
        ValueError: the configuration's is not so; it is named what is different.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        if others := [*different(model)]:
            raise ValueError(
                f"{', '.join(others)}: the plain model has softmax and Lightning layers with SwiGLU; take these"
            )
        self.embedding, self.vocab = nn.Embedding(model.padded_vocab, model.hidden), model.vocab
        self.layers = nn.ModuleList(
            PlainLayer(model.cards[kind].has_state, i, model) for i, kind in enumerate(model.kinds)
        )
        self.norm = nn.RMSNorm(model.hidden, model.norm_eps)
        here, there = sum(p.numel() for p in self.parameters()), sum(parameters(model).values())
        if here != there:
            raise ValueError(
                f"the plain model has {here:,} parameters for {there:,}: leave sizes and norms as they are"
            )
        for weight in self.parameters():
            if weight.dim() > 1 and weight.shape[-1] != model.linear_head_width:
                nn.init.normal_(weight, 0.0, model.init_std)

    def forward(self, batch: SimpleNamespace) -> Tensor:
        x = self.embedding(batch.tokens)
        for layer in self.layers:
            x = layer(x, batch)
        logits = F.linear(self.norm(x), self.embedding.weight[: self.vocab])  # its padding is in no softmax
        return F.cross_entropy(logits, batch.targets, reduction="none")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def plain_batch(batch: RankBatch, model: Model) -> SimpleNamespace:
    lengths = [n for n in batch.packed.layout.lengths if n]
    cos, sin = (t[:, None] for t in batch.packed.rotary(model.rope_base, model.head_width))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return SimpleNamespace(
        tokens=batch.tokens,
        targets=batch.targets,
        mask=batch.loss_mask,
        lengths=lengths,
        cos=cos,
        sin=sin,
        cu_seqlens=cu_seqlens,
    )


class Plain:
    """The plain model's training step."""

    def __init__(self, settings: Config) -> None:
        self.settings, self.model = settings, PlainModel(settings.model)
        o = settings.optimizer
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=o.weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)

    def step(self, batches: list[RankBatch]) -> float:
        prepared = [plain_batch(batch, self.settings.model) for batch in batches]
        tokens = sum(batch.mask.sum() for batch in prepared)
        total = 0.0
        for batch in prepared:
            loss = (self.model(batch) * batch.mask).sum() / tokens
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    from lsys.train.engine import Engine

    settings = load(arguments.config, parse_overrides(["--train.precision", "fp32", "--train.z-loss", "0"]))
    try:
        plain = Plain(settings)
    except ValueError as error:
        parser.error(f"{arguments.config}: {error}")
    corpora = [Corpus.open(str(corpus.path)) for corpus in settings.data.corpora]
    stream = TokenStream(corpora, [1.0] * len(corpora), seed=0, split="train", validation_fraction=0.01)
    planner = Planner(stream, settings.train.batch_tokens, settings.train.micro_batch_tokens)
    times: dict[str, list[float]] = {"lsys": [], "plain": []}
    with process_groups(settings.parallel.model_copy(update=dict(tensor=1, pipeline=1, context=1)), Launch()) as groups:
        engine = Engine(settings, groups)
        for step in range(arguments.steps + 2):
            batches = planner.step(step).on_rank(0, groups.device)

            def lsys_step(batches: list[RankBatch] = batches) -> None:
                engine.forward_backward(batches)
                engine.step()

            for name, run in (("lsys", lsys_step), ("plain", lambda batches=batches: plain.step(batches))):
                began = time.perf_counter()
                run()
                if step >= 2:  # the first two warm up
                    times[name].append(time.perf_counter() - began)
    tokens = settings.train.batch_tokens
    speeds = {name: tokens / statistics.median(each) for name, each in times.items()}
    threads = torch.get_num_threads()
    print(f"{arguments.config}: {tokens} tokens a step, {threads} thread(s), median of {arguments.steps} steps")
    for name, speed in speeds.items():
        print(f"  {name:5} {speed:10,.0f} tokens/s")
    print(f"  lsys / plain = {speeds['lsys'] / speeds['plain']:.3f}")


if __name__ == "__main__":
    main()
