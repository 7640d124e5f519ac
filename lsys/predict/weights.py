"""Parameters, gradients and optimizer states of one rank, to the byte, as Megatron-core 0.16.1 lays them out.

Megatron's DDP puts a chunk's gradients in one fp32 buffer, in reverse order of the parameters, cut in buckets
(`megatron/core/distributed/param_and_grad_buffer.py`). With the distributed optimizer each parameter begins at a multiple of
64 elements, each bucket's end is padded to a multiple of lcm(data x context ranks, 128), parameters live in such a buffer too,
and each of the D ranks keeps the states of the D-th part of every bucket. Adam has two fp32 moments a number, a step count
(4 bytes) a parameter, and for bf16 an fp32 copy of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm

from lsys.config.methods import ITEMSIZE
from lsys.config.schema import Config
from lsys.mixers.card import Card, MixerCard
from lsys.mixers.channel import ChannelCard
from lsys.predict.deployment import Deployment


@dataclass(frozen=True)
class Parameter:
    """A rank's piece of a parameter.

    Attributes:
        numel: of the piece.
        summed: whether the tensor ranks sum its gradients: those of norms, and of what is whole on every tensor rank.
        shared: whether it is the embedding that first and last stage share, which has a bucket of its own.
        is_trained: whether it has a gradient; else it is in no bucket, and no optimizer has its states.
    """

    name: str
    numel: int
    summed: bool = False
    shared: bool = False
    is_trained: bool = True


@dataclass(frozen=True)
class Weights:
    """Bytes of one rank. `tuple`s are by virtual chunk.

    Attributes:
        parameters, gradients, optimizer: bytes.
        buckets: by chunk, elements of each bucket, padding included.
        summed: elements whose gradients the tensor ranks sum.
        shared: elements of the embedding's piece, if first and last stage sum its gradients.
        count: elements of parameters, without padding.
        updated: elements that this rank's optimizer updates.
        tensors: parameters of which this rank's optimizer updates a part.
    """

    parameters: int
    gradients: int
    optimizer: int
    buckets: tuple[tuple[int, ...], ...]
    summed: int
    shared: int
    count: int
    updated: int
    tensors: int


def layer_parameters(config: Config, card: Card, channels: ChannelCard) -> Iterator[Parameter]:
    """Parameters of one layer, in the order in which its modules were made."""
    tensor, hidden = config.parallel.tensor, config.model.hidden
    yield Parameter("input_layernorm", hidden, tensor > 1)
    yield Parameter("in_proj", card.in_width // tensor * hidden)
    yield Parameter("out_proj", card.out_width // tensor * hidden)
    yield from _pieces(card, tensor)
    if not channels.is_empty:
        yield Parameter("pre_mlp_layernorm", hidden, tensor > 1)
        yield from _pieces(channels, tensor)


def _pieces(card: MixerCard, tensor: int) -> Iterator[Parameter]:
    for weight in card.weights():
        numel = weight.numel // tensor if weight.is_cut else weight.numel
        yield Parameter(weight.name, numel, weight.is_summed and tensor > 1, is_trained=weight.is_trained)


def chunk_parameters(deployment: Deployment, stage: int, chunk: int) -> list[Parameter]:
    """Parameters of one virtual chunk of a stage, in the order of its modules."""
    config = deployment.config
    model, tensor = config.model, config.parallel.tensor
    embedding = model.padded_vocab // tensor * model.hidden
    first, last, one = (
        deployment.is_first(stage, chunk),
        deployment.is_last(stage, chunk),
        deployment.mesh.pipeline == 1,
    )
    found = [Parameter("embedding", embedding, shared=model.tied and not one)] if first else []
    for layer in deployment.kinds(stage, chunk):
        found += layer_parameters(config, deployment.cards[layer.mixer], deployment.channels[layer.channels])
    if last:
        found.append(Parameter("final_layernorm", model.hidden, tensor > 1))
        if not (first and model.tied):
            found.append(Parameter("output_layer", embedding, shared=model.tied and not one))
    return found


def weights(deployment: Deployment, stage: int, replica: int = 0) -> Weights:
    """Bytes of the ranks of a stage; replica: which of the data x context ranks, for the distributed optimizer's part."""
    config, ranks = deployment.config, deployment.replicas
    distributed, itemsize = config.optimizer.distributed, ITEMSIZE[config.train.precision]
    buckets, placed, every = [], 0, []
    updated = tensors = 0
    for chunk in range(deployment.chunks):
        made = chunk_parameters(deployment, stage, chunk)
        every += made
        parameters = [parameter for parameter in made if parameter.is_trained]
        limit = (
            max(40_000_000, 1_000_000 * deployment.mesh.data)
            if deployment.overlap and stage == 0 and chunk == 0
            else None
        )
        cut = _buckets(parameters, ranks if distributed else 0, limit)
        buckets.append(tuple(stop - start for start, stop, _ in cut))
        placed += sum(buckets[-1])
        for start, stop, places in cut:
            part = (stop - start) // ranks if distributed else stop - start
            begin = start + replica * part if distributed else start
            held = [min(b, begin + part) - max(a, begin) for a, b in places]
            updated += sum(n for n in held if n > 0)
            tensors += sum(n > 0 for n in held)
    count = sum(parameter.numel for parameter in every)
    fixed = sum(parameter.numel for parameter in every if not parameter.is_trained)
    states = (4 * config.optimizer.moments + (4 if itemsize == 2 else 0)) * updated + 4 * tensors
    return Weights(
        parameters=itemsize * (placed + fixed if distributed else count),
        gradients=4 * placed,
        optimizer=states,
        buckets=tuple(buckets),
        summed=sum(p.numel for p in every if p.summed and p.is_trained),
        shared=sum(p.numel for p in every if p.shared),
        count=count,
        updated=updated,
        tensors=tensors,
    )


Bucket = tuple[int, int, list[tuple[int, int]]]  # begin and end, padded, and where its parameters are


def _buckets(parameters: Sequence[Parameter], ranks: int, limit: int | None) -> list[Bucket]:
    """The buckets of a chunk, for a distributed optimizer over `ranks` (0: a plain one); limit: elements of a full one."""

    def pad(at: int, unit: int) -> int:
        return -(-at // unit) * unit if ranks else at

    unit, found = lcm(max(ranks, 1), 128), list[Bucket]()
    begin, at = 0, 0
    places: list[tuple[int, int]] = []

    def close() -> None:
        nonlocal begin, at, places
        found.append((begin, pad(at, unit), places))
        begin = at = found[-1][1]
        places = []

    for parameter in reversed(parameters):
        at = pad(at, 64)
        alone = parameter.shared and ranks > 0
        if alone and places:
            close()
        places.append((at, at + parameter.numel))
        at += parameter.numel
        if alone or (limit is not None and at - begin >= limit):
            close()
    if places:
        close()
    return found
