"""Every benchmark starts: as a file from any folder and as a module, from a plain clone, whatever sys.path begins with."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = {"kernels_sm90": "triton"}  # of optional packages
COMMANDS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem != "__init__")
# Each command in a fork of one process, for torch takes seconds to start, and without what shows an editable lsys to Python.
DRIVER = """
import contextlib, importlib.util, io, os, runpy, sys, traceback
import torch
form, root, *names = sys.argv[1:]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
assert (importlib.util.find_spec("lsys") is None) == (form == "file"), sys.path

def told(name):
    sys.argv, said = [name, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            if form == "module":
                runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(f"{root}/bench/{name}.py", run_name="__main__")
        ended = "it did not exit"
    except SystemExit as end:
        ended = end.code
    except BaseException:
        ended = traceback.format_exc()
    if ended or "usage: " not in said.getvalue():
        print(f"{name}: {ended}\\n{said.getvalue()}", flush=True)
        return 1
    return 0

failed = 0
for name in names:
    if (child := os.fork()) == 0:
        os._exit(told(name))
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.Popen]:
    """Both forms at the same time, from a folder that is none of ours. A module is found in the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    can = [name for name in COMMANDS if name not in NEEDED or importlib.util.find_spec(NEEDED[name])]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    forms = {"file": environment, "module": environment | {"PYTHONPATH": str(ROOT)}}
    return {
        form: subprocess.Popen(
            [sys.executable, "-c", DRIVER, form, str(ROOT), *can],
            env=variables, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for form, variables in forms.items()
    }  # fmt: skip


@pytest.mark.parametrize("form", ["file", "module"])
def test_every_command_tells_how_it_is_used(started: dict[str, subprocess.Popen], form: str) -> None:
    said, _ = started[form].communicate(timeout=300)
    assert started[form].returncode == 0, said


@pytest.mark.parametrize("words", [["bench/startup.py"], ["-m", "bench.startup"]])
def test_the_interpreter_finds_both_forms_in_the_checkout(words: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, *words, "--help"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_commands_that_pages_name_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.py")]
    named = {name for page in pages for name in re.findall(r"bench/([\w/]+\.py)", page.read_text())}
    assert {f"{command}.py" for command in ("step", "attention", "gpu", "straggler")} <= named
    assert not [
        name
        for name in named - {"NAME.py"}
        if not any((ROOT / tree / name).exists() for tree in ("bench", "lsys/bench"))
    ]
