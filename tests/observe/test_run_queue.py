"""How long a thread waited for a core, where the system counts it."""

import os
from unittest import mock

import pytest

from lsys.observe.clocks import RunQueue


def test_its_second_figure_is_nanoseconds() -> None:
    queue = RunQueue()
    with mock.patch("lsys.observe.clocks.os.pread", return_value=b"7000000000 2500000000 12\n"):
        assert queue() == 2.5
    queue.close()


@pytest.mark.parametrize("counts", [b"", b"0 0 0\n"])
def test_a_system_that_does_not_count_is_told(counts: bytes) -> None:
    """The thread has run, so that of its time slices there is one at least."""
    files = []

    def opened(path: str, flags: int) -> int:
        files.append(opening(path, flags))
        return files[-1]

    opening = os.open
    with (
        mock.patch("lsys.observe.clocks.os.open", opened),
        mock.patch("lsys.observe.clocks.os.pread", return_value=counts),
        pytest.raises(OSError, match="schedstat holds no counts"),
    ):
        RunQueue()
    with pytest.raises(OSError):
        os.fstat(files[0])  # it is closed
