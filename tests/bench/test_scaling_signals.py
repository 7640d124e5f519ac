"""A sweep that is stopped ends its ranks, and says so."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import is_alive, number

from lsys.bench.signals import STOPPING, Signals

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

# The tests may run in a shell's background, whose children ignore SIGINT.
SWEEP = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from lsys.bench import scaling
scaling._require_sound = lambda *_: None
scaling.find_spec = lambda name: name
config, out, launcher = sys.argv[1:]
scaling.main(scaling.ScalingOptions(Path(config), ranks="1,2", out=Path(out), launcher=launcher), [])
"""
# A launcher with a rank of its own, both of which tell their ids.
LAUNCHER = "#!/bin/sh\n{trap}\necho $$ >{folder}/pid0\nsleep 100 & echo $! >{folder}/pid1\nwait; wait; wait\n"


@pytest.mark.parametrize(
    ("trap", "numbers"),
    [
        ("", [signal.SIGTERM]),
        ("", [signal.SIGINT]),
        ("trap '' TERM", [signal.SIGTERM, signal.SIGTERM]),  # it does not heed the first
    ],
)
def test_a_stopped_sweep_leaves_nothing_behind(tmp_path: Path, trap: str, numbers: list[int]):
    launcher, out = tmp_path / "launcher", tmp_path / "out"
    launcher.write_text(LAUNCHER.format(trap=trap, folder=tmp_path))
    command = [sys.executable, "-c", SWEEP, str(QUICKSTART), str(out), f"sh {launcher}"]
    sweep = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        ended = [number(tmp_path / f"pid{each}") for each in range(2)]
        for sent in numbers:
            sweep.send_signal(sent)
            time.sleep(0.5)
        _, said = sweep.communicate(timeout=30)
    finally:
        sweep.kill()
    assert sweep.returncode == 128 + numbers[0] and "stopping the job" in said, said
    assert (
        len(numbers) > 1
        or f"{signal.Signals(numbers[0]).name} stopped the sweep on 1 ranks; {out}/ranks-1 has its logs" in said
    )
    assert not any(map(is_alive, ended))
    assert [each.name for each in out.iterdir()] == ["ranks-1"]


def test_what_a_launcher_leaves_is_ended(tmp_path: Path):
    with Signals() as signals:
        assert signals.run(["sh", "-c", f"sleep 100 & echo $! >{tmp_path}/pid; exit 3"]) == 3
    assert not is_alive(number(tmp_path / "pid"))


def test_what_was_ignored_stays_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_as_they_were_afterwards() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    with Signals() as signals:
        assert signal.getsignal(signal.SIGTERM) == signals._receive
    assert {number: signal.getsignal(number) for number in STOPPING} == before
