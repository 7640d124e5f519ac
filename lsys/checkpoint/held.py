"""What a checkpoint holds of an engine, as the engine gives it and takes it back."""

from collections.abc import Container
from typing import Any, Protocol

from lsys.config import Config
from lsys.runtime.groups import Groups


class Held(Protocol):
    """What is saved.

    Attributes:
        settings: the run's configuration; a checkpoint of another model is refused.
        groups: the ranks. Those of data x context share the work of writing what all of them hold.
    """

    @property
    def settings(self) -> Config: ...

    @property
    def groups(self) -> Groups: ...

    def state(self, *, loading: bool) -> dict[str, Any]:
        """All that a resumed run needs: nested dicts of `ShardedTensor`s (Megatron's dist_checkpointing), which are resharded, and of plain values
        and tensors, which are equal on all ranks and stored once.

        Args:
            loading: whether it is to be filled from a checkpoint; else it is to be written.
        """

    def load_state(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint: `state(loading=True)`, filled. Hyperparameters stay those of the configuration."""

    def weights_state(self, stored: Container[str]) -> dict[str, Any]:
        """As `state(loading=True)`, of the model alone: what a run takes that begins with another one's weights.

        Args:
            stored: keys of the checkpoint's tensors and objects, such as the fp32 copies of an optimizer; plain values are not among them.
        """

    def load_weights(self, state: dict[str, Any]) -> None:
        """Take `weights_state`, filled. Moments, counts and schedule stay those of a new engine."""
