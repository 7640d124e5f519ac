"""Steps that succeed on every rank or fail on every rank, so that none waits for one that gave up."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


class RankFailure(Exception):
    """A step failed on some ranks. Raised on all of them, with the same content.

    Attributes:
        errors: by rank, (errno or None, message).
    """

    def __init__(self, errors: dict[int, tuple[int | None, str]]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        """Equal messages once; ranks are named where not all failed alike."""
        texts = {
            text: [r for r, (_, other) in self.errors.items() if other == text] for _, text in self.errors.values()
        }
        return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in texts.items())

    @property
    def messages(self) -> str:
        """The messages without ranks, each once."""
        return "; ".join(dict.fromkeys(text for _, text in self.errors.values()))


def agree(action: Callable[[], T]) -> T:
    """Run `action` on this rank and hear how it went on the others (collective over the default group).

    Raises RankFailure on every rank where it failed on any. Collectives inside `action` must come before whatever may fail on a part
    of the ranks.
    """
    result, failure = None, None
    try:
        result = action()
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        failure = error
    heard: list = [None] * dist.get_world_size()
    dist.all_gather_object(heard, None if failure is None else _describe(failure))
    errors = {rank: error for rank, error in enumerate(heard) if error is not None}
    if errors:
        raise RankFailure(errors) from failure
    return result  # type: ignore[return-value]


def agree_on_first(action: Callable[[], T]) -> T:
    """Like `agree`, but only rank 0 acts, and all ranks get its result."""
    box: list = [None]

    def act() -> None:
        if dist.get_rank() == 0:
            box[0] = action()

    agree(act)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _describe(error: BaseException) -> tuple[int | None, str]:
    if isinstance(error, CheckpointException) and error.failures:  # torch's collection of what happened on the ranks
        error = next(iter(error.failures.values()))[0]  # type: ignore[assignment]
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return getattr(error, "errno", None), text or type(error).__name__
