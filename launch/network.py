"""Which interface and address of this node the others see. IPv4, Linux; the standard library only."""

import fcntl
import ipaddress
import socket
import struct
import sys
from typing import NamedTuple

SIOCGIFADDR = 0x8915
ELSEWHERE = "192.0.2.1"  # an address for documentation: the default route leads there


class NetworkError(ValueError):
    """A host or an interface that does not do; says what would."""


class Place(NamedTuple):
    """This node on the network of the job: the rendezvous host's address, own interface and address."""

    host: str
    interface: str
    address: str

    @property
    def is_host(self) -> bool:
        return self.address == self.host or _is_own(self.host)


def place(host: str, interface: str = "") -> Place:
    """Where this node is, seen from `host`: by the interface given, else the one whose route leads there.

    Raises:
        NetworkError: the host's name does not resolve, or only to a loopback address; or the interface has no address.
    """
    there = resolve(host)
    if not _is_loopback(there) or host == "localhost" or host.startswith("127."):
        address = _address_of(interface) if interface else _own_address(there)
    elif host.split(".")[0] == socket.gethostname().split(".")[0]:
        # Distributions map a machine's own name to 127.0.1.1; what binds to it is not seen by other nodes.
        there = address = _address_of(interface) if interface else _own_address(ELSEWHERE)
    else:
        raise NetworkError(f"the host {host!r} is {there} here, which is this node itself; give its address")
    return Place(there, interface or _interface_of(address), address)


def resolve(host: str) -> str:
    """The IPv4 address of a name.

    Raises:
        NetworkError: there is none.
    """
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        problem = f"the host {host!r} has no IPv4 address here ({error.strerror})"
        raise NetworkError(f"{problem}; give the address itself") from None


def _own_address(there: str) -> str:
    """The address that this node would send from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # a UDP socket connects without sending
        try:
            probe.connect((there, 9))
        except OSError as error:
            raise NetworkError(f"no route to {there}: {error.strerror}; name an interface") from None
        return probe.getsockname()[0]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def interfaces() -> dict[str, str]:
    """Address by interface, of those that have one."""
    found = {}
    for _, name in socket.if_nameindex():
        try:
            found[name] = _address_of(name)
        except NetworkError:
            continue
    return found


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
        except OSError:
            there = ", ".join(name for _, name in socket.if_nameindex())
            raise NetworkError(f"the interface {interface!r} has no IPv4 address; there are {there}") from None


def _interface_of(address: str) -> str:
    for name, own in interfaces().items():
        if own == address:
            return name
    return "lo" if _is_loopback(address) else ""


def _is_own(address: str) -> bool:
    """Whether an address is this node's: only then a socket can be bound to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    try:
        here = place(*sys.argv[1:3])
    except NetworkError as refused:
        sys.exit(f"launch: {refused}")
    print(int(here.is_host), here.host, here.interface or "-", here.address)
