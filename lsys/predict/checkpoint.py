"""What a checkpoint takes on the disk."""

from __future__ import annotations

from lsys.config.methods import ITEMSIZE
from lsys.config.schema import Config
from lsys.observe.flops import parameters


def checkpoint_bytes(config: Config) -> int:
    """Bytes of a checkpoint's tensors, alike at all degrees: parameters, the optimizer's states and its fp32 copy of parameters, if it has one.

    States of modules that are no parameters, random numbers and descriptions are not in it: kilobytes.
    """
    itemsize = ITEMSIZE[config.train.precision]
    main = (
        4 if itemsize == 2 or config.optimizer.distributed else 0
    )  # the distributed optimizer has a copy of its own of fp32, too
    return sum(parameters(config.model).values()) * (itemsize + main + 4 * config.optimizer.moments)
