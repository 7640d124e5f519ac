"""Each layer with a state: equal to its paper's definition, causal, blind to other documents, alike on any number of ranks."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.comparing import largest
from torch import Tensor

from lsys.mixers.registry import module_class

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "L": ("lightning", {}),
    "L LRPE srms": ("lightning", dict(lrpe="first", norm="srms", key_heads=2, key_dim=6)),
    "L no decay": ("lightning", dict(decay=False, lrpe="all")),
    "R": ("retention", {}),
    "R shared keys": ("retention", dict(key_heads=2, key_dim=6)),
    "G": ("gla", dict(gate_rank=3)),
    "G shared keys": ("gla", dict(key_heads=2, key_dim=6)),
    "M": ("mamba2", dict(key_heads=2, key_dim=6)),
    "M width 1": ("mamba2", dict(conv_width=1)),
    "N": ("delta_net", dict(key_heads=2, key_dim=6)),
    "N own heads": ("delta_net", {}),
    "K": ("kimi_delta", dict(key_heads=2, key_dim=6)),
    "K own heads": ("kimi_delta", dict(own=dict(gate_rank=3, conv_width=2))),
    "D": ("gated_delta", dict(key_heads=2, key_dim=6)),
    "D negative": ("gated_delta", dict(conv_width=2, negative_eigenvalues=True)),
}
LENGTHS = [1, 5, 0, 19, 2, 10]
HIDDEN, SLACK = 12, 2


@contextmanager
def mixer_of(rank: int, ranks: int, case: str, dtype: torch.dtype, **parallel: int) -> Iterator[Any]:
    """(mixer, model, tensor rank, context rank): the second layer, all its parameters random, alike for all degrees."""
    from support import parity

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.model.megatron_config import transformer_config
    from lsys.model.mixers.mixer import MixerOptions
    from lsys.model.parameters import initialise, pieces
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    kind, linear = CASES[case]
    sizes = {key: value for key, value in linear.items() if key != "own"}
    own = {kind: linear.get("own", {})}
    changes: dict[str, Any] = {f"parallel__{axis}": degree for axis, degree in parallel.items()}
    changes |= dict(
        model__pattern=["softmax", kind],
        model__hidden=HIDDEN,
        model__linear=sizes,
        model__mixers=own,
        model__init_std=0.4,
    )
    settings = parity.settings(**changes)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=ranks)) as groups:
        card = settings.model.cards[kind]
        options = MixerOptions(card, settings.parallel.linear)
        mixer = module_class(card)(transformer_config(settings), 2, groups.collection, options).to(dtype)
        initialise(mixer, settings.model, seed=0)
        for piece in pieces(mixer):
            seed = int.from_bytes(hashlib.sha256(piece.key.encode()).digest()[:4], "little")
            noise = torch.randn(piece.shape, generator=torch.Generator().manual_seed(seed))
            piece.data.add_(0.2 * noise[piece.slices])
        yield mixer, settings.model, groups.collection.tp.rank(), groups.context


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream [T, hidden] and what weighs its outputs."""
    generator = torch.Generator().manual_seed(0)
    x, weigh = torch.randn(2, sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    return x, weigh


def packed_of(layout: Any, rank: int, **more: Any) -> Any:
    from lsys.model.packed import PackedMicroBatch

    return PackedMicroBatch(layout=layout, positions=layout.positions(rank), **more)


def run(mixer: Any, x: Tensor) -> Tensor:
    """[T, hidden] -> [T, hidden] on one device, with slack slots behind that hold nonsense.

    It is finite: a projection's weights have the gradient 0 from slack, and 0 times NaN is none.
    """
    from lsys.parallel.layout import SequenceLayout

    slots = torch.cat([x, torch.full((SLACK, HIDDEN), 1e4, dtype=x.dtype)])
    packed = packed_of(SequenceLayout.contiguous(LENGTHS, 1), 0)
    return mixer(slots[:, None], packed_seq_params=packed)[0][: len(x), 0]


def _against_paper(rank: int, ranks: int, case: str, dtype: torch.dtype, strong: bool = False) -> dict[str, float]:
    """Differences from the definition, in fp64, of the output and of the gradients of x and of every parameter, relative.

    strong: log-decays far below -20, with others near 0 beside them.
    """
    from support.published import LAYERS

    decays: list[Tensor] = []
    with mixer_of(rank, ranks, case, dtype) as (mixer, model, *_):
        if strong:
            with torch.no_grad():
                mixer.decay.A_log.add_(3)
                mixer.decay.dt_bias[::3] += 8
            mixer.decay.register_forward_hook(lambda *call: decays.append(call[-1][1].detach()))
        x, weigh = drawn(dtype)
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        y = run(mixer, x.requires_grad_())
        assert not strong or (decays[0].min() < -100 and decays[0].max() > -1)
        found = [y, *torch.autograd.grad((y * weigh).sum(), (x, *parameters))]
        leaf = x.detach().double().requires_grad_()
        weights = {name: p.detach().double().requires_grad_() for name, p in mixer.named_parameters()}
        layer = LAYERS[CASES[case][0]]
        y = torch.cat([layer(part, weights, model, 1) for part in leaf.split(LENGTHS) if len(part)])
        wanted = [y, *torch.autograd.grad((y * weigh.double()).sum(), (leaf, *weights.values()))]
        pairs = zip(("y", "x", *names), found, wanted, strict=True)
        return {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}


# Retention's phases are tables of fp32. In fp32, gates and short documents make small parts of large sums.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
@pytest.mark.parametrize("case", CASES)
def test_is_the_published_layer(gloo: Any, case: str, dtype: torch.dtype, tolerance: float) -> None:
    [differences] = gloo(1, _against_paper, case, dtype)
    tolerance = 1e-6 if case[0] == "R" and dtype == torch.float64 else tolerance
    assert all(difference < tolerance for difference in differences.values()), differences


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_strong_decay_is_the_published_layer(gloo: Any, dtype: torch.dtype, tolerance: float) -> None:
    [differences] = gloo(1, _against_paper, "K", dtype, True)
    assert all(difference < tolerance for difference in differences.values()), differences


def _perturbed(rank: int, ranks: int, case: str, dtype: torch.dtype) -> None:
    with mixer_of(rank, ranks, case, dtype) as (mixer, *_), torch.no_grad():
        x, _ = drawn(dtype)
        before = run(mixer, x)
        for at in (0, 6, 15, 24, 25):  # first and last tokens of documents, and one within
            stop = next(sum(LENGTHS[: d + 1]) for d in range(len(LENGTHS)) if at < sum(LENGTHS[: d + 1]))
            changed = x.clone()
            changed[at] *= -2
            after = run(mixer, changed)
            assert torch.equal(after[:at], before[:at]) and torch.equal(after[stop:], before[stop:]), at
            assert (after[at:stop] != before[at:stop]).any(1).all(), at


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_a_token_changes_only_those_from_there_on_in_its_document(gloo: Any, case: str, dtype: torch.dtype) -> None:
    gloo(1, _perturbed, case, dtype)


def _share(rank: int, ranks: int, case: str, layout_name: str, parallel: dict[str, int]) -> tuple[Any, Any, list[Any]]:
    """This rank's places in the stream with outputs and gradients of x there, and its pieces of parameters' gradients."""
    from support.layouts import layouts

    from lsys.model.parameters import pieces

    with mixer_of(rank, ranks, case, torch.float64, **parallel) as (mixer, _, tensor_rank, comm):
        tensor, context = (parallel.get(axis, 1) for axis in ("tensor", "context"))
        layout = layouts(LENGTHS, context)[layout_name]
        slots = -(-max(layout.sizes) // tensor) * tensor

        def mine(x: Tensor) -> Tensor:
            held = layout.shard(x, comm.rank)
            return torch.nn.functional.pad(held, (0, 0, 0, slots - len(held))).chunk(tensor)[tensor_rank]

        x, weigh = (mine(each) for each in drawn(torch.float64))
        y = mixer(x.requires_grad_()[:, None], packed_seq_params=packed_of(layout, comm.rank, comm=comm))[0][:, 0]
        (y * weigh).sum().backward()
        places = torch.full((slots,), -1).index_copy(0, torch.arange(layout.tokens(comm.rank)), layout.index(comm.rank))
        gradients = {p.data_ptr(): p.grad for p in mixer.parameters()}
        parts = [(p.key, p.shape, p.slices, gradients[p.data.data_ptr()]) for p in pieces(mixer)]
        return places.chunk(tensor)[tensor_rank], (y.detach(), x.grad), parts


def merged(shares: list[tuple[Any, Any, list[Any]]]) -> dict[str, Tensor]:
    """Outputs, gradients of x and of whole parameters: the sum of all ranks' parts, which Megatron makes in a run."""
    whole = {name: torch.zeros(sum(LENGTHS), HIDDEN, dtype=torch.float64) for name in ("y", "x")}
    for places, rows, parts in shares:
        for name, values in zip(("y", "x"), rows, strict=True):
            whole[name][places[places >= 0]] += values[places >= 0]
        for key, shape, slices, gradient in parts:
            whole.setdefault(key, torch.zeros(shape, dtype=torch.float64))[slices] += gradient
    return whole


DEGREES = [dict(tensor=2), dict(context=2), dict(context=3), dict(tensor=2, context=2)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", DEGREES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_is_one_device(gloo: Any, case: str, parallel: dict[str, int]) -> None:
    wanted = merged(gloo(1, _share, case, "contiguous", {}))
    ranks = parallel.get("tensor", 1) * parallel.get("context", 1)
    for layout in ("zigzag", "random") if parallel.get("context", 1) > 1 else ("contiguous",):
        found = merged(gloo(ranks, _share, case, layout, parallel))
        differences = {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}
        assert found.keys() == wanted.keys() and largest(differences.values()) < 1e-10, (layout, differences)


def _token_by_token(rank: int, ranks: int, case: str) -> float:
    """How far a document read piece by piece, with what the layer keeps, is from the document read at once."""
    from lsys.model.cache import Cache
    from lsys.model.packed import PackedMicroBatch
    from lsys.parallel.layout import SequenceLayout

    with mixer_of(rank, ranks, case, torch.float64) as (mixer, *_), torch.no_grad():
        x, cache = drawn(torch.float64)[0], Cache()
        outputs: list[torch.Tensor] = []
        whole = mixer(x[:, None], packed_seq_params=packed_of(SequenceLayout.contiguous([len(x)], 1), 0))[0]
        sizes, kept = [7, 1, 1, 5, 1], []
        for part in x.split([*sizes, len(x) - sum(sizes)]):
            read = sum(map(len, outputs))
            layout, positions = SequenceLayout.contiguous([len(part)], 1), torch.arange(read, read + len(part))
            packed = PackedMicroBatch(layout=layout, positions=positions, cache=cache)
            outputs.append(mixer(part[:, None], packed_seq_params=packed)[0])
            kept.append(cache.bytes)
        assert len(set(kept)) == 1  # constant memory
        return float((torch.cat(outputs) - whole).norm() / whole.norm())


@pytest.mark.parametrize("case", CASES)
def test_goes_on_from_what_it_keeps(gloo: Any, case: str) -> None:
    assert gloo(1, _token_by_token, case)[0] < 1e-12
