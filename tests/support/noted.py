"""Functions that tell when they are called."""

from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def noted(events: list[Any], event: Any, function: Callable[..., Result]) -> Callable[..., Result]:
    """The function, which first appends the event to the list."""

    def noting(*args: Any, **options: Any) -> Result:
        events.append(event)
        return function(*args, **options)

    return noting
