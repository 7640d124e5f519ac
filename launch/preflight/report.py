"""What one node tells about itself and about its way to the others."""

import ipaddress
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass
class Report:
    """A node, as the host hears of it. Sizes are bytes, times seconds.

    Attributes:
        name, address, interface: of the node. port: where it can be tried. index: its number where the launcher knows it, else -1.
        nodes, ranks: what this node takes the job to have: nodes, and ranks per node.
        versions: by package. code: digest of lsys's own files.
        mistakes: what this node finds wrong with the configuration. config: its keys and values; empty without one.
        files: size by path of what must be there; -1: it is not. checkpoint: size of one.
        gpus: name and memory of each. driver: its version.
        shm, descriptors: free shared memory, and the limit of open files.
        offset, uncertainty: this node's clock less the host's, known to within the uncertainty.
        folder: train.folder. free: free bytes there. kept: checkpoints in it. marker: whether the host's marker file is in it;
            error: why nothing can be written there.
        reach: round trip to other nodes by their place in the list, or why there is none. rates: bytes per second.
    """

    name: str
    address: str
    interface: str = ""
    port: int = 0
    index: int = -1
    nodes: int = 1
    ranks: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    code: str = ""
    mistakes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    checkpoint: int = 0
    gpus: list[str] = field(default_factory=list)
    driver: str = ""
    shm: int = 0
    descriptors: int = 0
    offset: float = 0.0
    uncertainty: float = 0.0
    folder: str = ""
    free: int = 0
    kept: int = 0
    marker: bool = True
    error: str = ""
    reach: dict[str, float | str] = field(default_factory=dict)
    rates: dict[str, float | str] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def heard(cls, message: Any) -> Self:
        """The report of another node.

        Raises:
            ValueError: it is no report of this version.
        """
        empty = cls("", "")
        if not isinstance(message, dict) or message.keys() != {each.name for each in fields(cls)}:
            raise ValueError("not a report of this version of lsys")
        for name, value in message.items():
            kind = type(getattr(empty, name))
            if not isinstance(value, (int, float) if kind is float else kind):
                raise ValueError(f"{name} of a report is a {type(value).__name__}")
        ipaddress.IPv4Address(message["address"])
        return cls(**message)
