"""Parameters by their global names: where each rank's piece lies in the whole, and initial values that no degree of parallelism changes.

Megatron's sharded state dict knows, for each local tensor, the key of the whole tensor, its shape and this piece's offset; it is the one
source of that knowledge here.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from lsys.config.model import Model


@dataclass(frozen=True)
class Piece:
    """A part of a whole parameter.

    Attributes:
        key, shape: of the whole. offset: of this part.
        data: a view of the local parameter (or of a tensor of its shape).
        initial: fills the whole, fp32, from a generator, if the parameter brings its own initial values.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: Tensor
    initial: Callable[[Tensor, torch.Generator], Any] | None = None

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.data.shape, strict=True))


def pieces(chunk: MegatronModule, *, gradients: bool = False) -> Iterator[Piece]:
    """All local parameters of a model chunk, or the gradients that Megatron's DDP accumulated for them (`main_grad`)."""
    parameters = dict(chunk.named_parameters())
    by_pointer = {parameter.data_ptr(): parameter for parameter in parameters.values()}
    for entry in chunk.sharded_state_dict().values():
        if not isinstance(entry, (ShardedTensor, ShardedTensorFactory)) or entry.data.data_ptr() not in by_pointer:
            continue
        parameter = by_pointer[entry.data.data_ptr()]
        data = parameter.main_grad.view(parameter.shape) if gradients else parameter.data  # type: ignore[attr-defined]
        whole = isinstance(entry, ShardedTensor)
        parts = [entry] if whole else entry.build_fn(entry.key, data, entry.replica_id, entry.flattened_range)
        for part in parts:
            shape, offset = tuple(part.global_shape), tuple(part.global_offset)
            yield Piece(part.key, shape, offset, data if whole else part.data, getattr(parameter, "initial", None))


def initialise(chunk: MegatronModule, model: Model, seed: int) -> None:
    """Fill a chunk's parameters with values that depend on (seed, global name) alone, so every degree of parallelism starts alike.

    Norm weights are 1; matrices N(0, init_std), those that write to the residual stream N(0, init_std / sqrt(2 layers)) (GPT-2);
    parameters with an attribute `initial` have their own values.
    """
    with torch.no_grad():
        for piece in pieces(chunk):
            generator = torch.Generator(device=piece.data.device)
            generator.manual_seed(
                int.from_bytes(hashlib.sha256(f"{seed}/{piece.key}".encode()).digest()[:8], "little") >> 1
            )
            whole = torch.empty(piece.shape, dtype=torch.float32, device=piece.data.device)
            if piece.initial is not None:
                piece.initial(whole, generator)
            elif len(piece.shape) == 1:
                whole.fill_(1.0)
            else:  # tokens of the vocabulary before its padding, whose size changes none of them
                for rows in whole.split(
                    [model.vocab, len(whole) - model.vocab] if _is_vocabulary(piece) else len(whole)
                ):
                    rows.normal_(0.0, _std(piece.key, model), generator=generator)
            piece.data.copy_(whole[piece.slices])


def _is_vocabulary(piece: Piece) -> bool:
    return piece.key.startswith(("embedding.", "output_layer."))


def _std(key: str, model: Model) -> float:
    writes = key.endswith(("out_proj.weight", "linear_fc2.weight"))
    return model.init_std / math.sqrt(2 * model.layers) if writes else model.init_std
