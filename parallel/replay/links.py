"""Links between ranks: see `lsys.parallel.links`."""

from lsys.parallel.links import HARDWARE, Link, Links

__all__ = ["HARDWARE", "Link", "Links"]
