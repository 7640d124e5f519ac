"""Links between ranks: see `lsys.parallel.links`."""

from lsys.parallel.links import Link, Links

__all__ = ["Link", "Links"]
