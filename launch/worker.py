"""A worker that ends with its agent: `python -m lsys.launch.worker -m lsys train CONFIG` is `python -m lsys train CONFIG`.

torchrun's agent ends its workers when it is asked to stop, but one that is killed leaves them behind: they hold the
GPUs, and train on. Here the kernel ends them.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
AGENT = "LSYS_AGENT"  # the agent's process id, set by run.sh


def end_with_parent(agent: int | None) -> None:
    """Have the kernel send SIGKILL when the parent ends. Exits if the parent, `agent`, has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if agent is not None and os.getppid() != agent:
        sys.exit("launch: the agent ended before its worker began")


def main(words: Sequence[str]) -> None:
    """Become `python -u WORDS`; the kernel's promise outlives the exec."""
    if not words:
        sys.exit("launch: a worker takes -m MODULE or a script")
    agent = os.environ.get(AGENT, "")
    end_with_parent(int(agent) if agent.isdigit() else None)
    os.execv(sys.executable, [sys.executable, "-u", *words])


if __name__ == "__main__":
    main(sys.argv[1:])
