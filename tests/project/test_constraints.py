"""The pinned versions can be installed on a machine that is not the developers': from the public index alone, with the CUDA build of torch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
UNREACHABLE = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError"
)


def plain(name: str) -> str:
    """A package's name as all its spellings have it."""
    return re.sub("[-_.]+", "-", name).lower()


def interpreter(version: str) -> str | None:
    """The path of an interpreter of this version; None where none is found. Beside a shim of pyenv lie the versions that it chooses from."""
    shim = shutil.which(f"python{version}")
    beside = Path(shim).parents[1].glob(f"versions/{version}.*/bin/python{version}") if shim else ()
    for candidate in filter(None, (shim, *map(str, beside))):
        asked = subprocess.run([candidate, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
        if not asked.returncode:
            return asked.stdout.strip()
    return None


def resolve(python: str, requirements: Path, constraints: Path, report: Path) -> subprocess.CompletedProcess[str]:
    """pip's choice for an interpreter, of what the public index has: with nothing that configures pip on this machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name == "PIP_CERT"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--dry-run",
        "--ignore-installed",
        "--retries",
        "1",
    ]
    command += ["--only-binary", ":all:", "-c", str(constraints), "-r", str(requirements), "--report", str(report)]
    environment = own | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(command, env=environment, cwd=report.parent, capture_output=True, text=True, timeout=600)


def wanted() -> list[str]:
    """What setup.py asks for, tools of development included."""
    script = (
        "import json, setuptools\nfrom distutils.core import run_setup\nd = run_setup('setup.py', stop_after='init')\n"
    )
    script += "print(json.dumps([*d.install_requires, *d.extras_require['dev']]))"
    return json.loads(
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    )


@pytest.fixture(scope="module")
def requirements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resolved") / "requirements.txt"
    path.write_text("\n".join(wanted()) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_constraints_hold_with_the_public_index_alone(version: str, requirements: Path) -> None:
    if (python := interpreter(version)) is None:
        pytest.skip(f"no Python {version} is found")
    report = requirements.parent / f"{version}.json"
    done = resolve(python, requirements, ROOT / "constraints.txt", report)
    if done.returncode and UNREACHABLE.search(done.stdout + done.stderr):
        pytest.skip("no package index can be reached")
    assert not done.returncode, done.stderr[-3000:]
    installed = json.loads(report.read_text())["install"]
    chosen = {plain(each["metadata"]["name"]): each["metadata"]["version"] for each in installed}
    assert {"torch", "megatron-core", "triton"} <= chosen.keys()
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert not {name: chosen[plain(name)] for name, at in pins if chosen.get(plain(name), at) != at}


@pytest.mark.slow
def test_a_pin_that_excludes_the_cuda_build_is_found(requirements: Path) -> None:
    """What once made every installation end that had no CPU wheel of torch at hand."""
    planted = requirements.parent / "planted.txt"
    planted.write_text((ROOT / "constraints.txt").read_text() + "\ntriton==3.9.0\n")
    done = resolve(sys.executable, requirements, planted, requirements.parent / "planted.json")
    if UNREACHABLE.search(done.stdout + done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode and "ResolutionImpossible" in done.stderr


@pytest.mark.parametrize(("version", "does"), [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)])
def test_pythons_that_do_not_do_are_refused_in_one_sentence(version: tuple[int, int], does: bool) -> None:
    check = re.search(r"^\t@\$\(PYTHON\) -c '(.*)'$", (ROOT / "Makefile").read_text(), re.M)
    assert check
    script = f"import sys\nsys.version_info = {version + (0,)}\n" + check[1].replace("$(PYTHON)", "python3")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode == 0) == does and len(done.stderr.splitlines()) == (not does)
    assert does or f"Python {version[0]}.{version[1]};" in done.stderr
