"""What several ranks hold alike is compared, bit for bit, before a checkpoint is written from one of them.

Of each tensor that more than one rank of a pipeline stage holds, every holder sends 8 bytes, and 8 that say which it is. Which comparison sees
which fault: docs/reliability.md.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from lsys.checkpoint.agreement import agree
from lsys.runtime.groups import own_device

CHUNK = 1 << 18  # words that are added up at a time: 2 MiB, which a core's cache holds
NAMED = 5  # tensors that an error names


class ReplicaError(ValueError):
    """Ranks that have to hold the same do not. Every rank raises the same one."""

    everywhere = True  # the command line prints it once
    exit_code = 1  # a launcher starts the run again, from its newest checkpoint


def require_equal(state: dict[str, Any], stage: int) -> None:
    """Compare the tensors of a sharded state dict with those of the other ranks (collective over all ranks).

    Args:
        stage: pipeline rank; a weight that two stages share is not compared over them, since each updates its own.

    Raises:
        ReplicaError: on all ranks: copies differ. It names the ranks in the minority, or all where there is none, and the tensors.
    """
    if dist.get_world_size() == 1:
        return
    parts = {_identity(part, stage): part for part in _parts(state)}
    held = _gather(sorted(parts))
    counts = Counter(each for ranks in held for each in ranks)
    shared = [[each for each in rank if counts[each] > 1] for rank in held]
    if not any(shared):
        return
    digests = agree(lambda: [digest(parts[each].data) for each in shared[dist.get_rank()]])
    copies: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, (those, found) in enumerate(zip(shared, _gather(digests, max(map(len, shared))), strict=True)):
        for each, value in zip(those, found, strict=False):
            copies[each][rank] = value
    wrong = {each: ranks for each, ranks in copies.items() if len(set(ranks.values())) > 1}
    if wrong:
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {each: parts[each].key for each in wrong if each in parts})
        names = {each: name for known in everyone for each, name in known.items()}
        raise ReplicaError(_told(wrong, names))


def _parts(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensorFactory):
            yield from nested_values(entry.build_fn(entry.key, entry.data, entry.replica_id, None))
        elif isinstance(entry, ShardedTensor):
            yield entry


def _identity(part: ShardedTensor, stage: int) -> int:
    """A number that says which part of which tensor it is."""
    text = f"{stage}/{part.key}/{part.global_offset}/{part.local_shape}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def digest(tensor: Tensor) -> int:
    """64 bits of a tensor's memory, computed where it is. Two that differ in one number have others, for certain.

    It adds up the words, each times an odd number that its place gives.
    """
    if not tensor.numel():
        return 0
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.itemsize % 8:
        flat = flat.clone()  # words begin where words may
    words = flat.view(torch.int64 if flat.nbytes % 8 == 0 else torch.uint8)
    odd = torch.arange(1, 2 * min(len(words), CHUNK), 2, device=words.device)
    sums = [(chunk * odd[: len(chunk)]).sum() for chunk in words.split(CHUNK)]
    total = 0
    for each in torch.stack(sums).tolist():  # one wait for the device
        total = (total * 0x9E3779B97F4A7C15 + each) % 2**64
    return total - 2**64 if total >= 2**63 else total


def _gather(numbers: list[int], most: int | None = None) -> list[list[int]]:
    """Those of every rank. Args: most: of any rank, if that is known; else lists are as long as they were, and 8 bytes more are sent."""
    device, world = own_device(), dist.get_world_size()
    lengths = [most or 0] * world
    if most is None:
        sizes = torch.empty(world, 1, dtype=torch.int64, device=device)
        dist.all_gather(list(sizes), torch.tensor([len(numbers)], device=device))
        lengths = sizes.flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.int64, device=device)
    padded[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64, device=device)
    found = torch.empty(world, len(padded), dtype=torch.int64, device=device)
    dist.all_gather(list(found), padded)
    return [row[:length] for row, length in zip(found.tolist(), lengths, strict=True)]


def _told(wrong: dict[int, dict[int, int]], names: dict[int, str]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for each, copies in wrong.items():
        groups[_who(copies)].append(names[each])
    found = []
    for who, those in groups.items():
        more = f" and {len(those) - NAMED} more" if len(those) > NAMED else ""
        found.append(f"{who} {', '.join(sorted(those)[:NAMED])}{more}")
    return (
        f"ranks that have to hold the same do not: {'; '.join(found)}. A bit has flipped in memory, or they did not compute alike. No checkpoint "
        "is written from it; started again, the run goes on from its newest one. If the same rank is named again, replace its device"
    )


def _who(copies: dict[int, int]) -> str:
    """Who differs from whom: the minority from the rest, if more than half agree."""
    (usual, count), *_ = Counter(copies.values()).most_common()
    right = [rank for rank, value in copies.items() if value == usual]
    if 2 * count <= len(copies):
        return f"ranks {', '.join(map(str, copies))} hold different"
    wrong = [rank for rank in copies if rank not in right]
    return f"{_ranks(wrong)} differs from {_ranks(right)} in"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
