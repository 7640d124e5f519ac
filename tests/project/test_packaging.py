"""What the wheel holds, read from setup.py without a build."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = {"lsys": "lsys", "kernels": "lsys.kernels", "parallel": "lsys.parallel", "launch": "lsys.launch"}


@pytest.fixture
def distribution(monkeypatch):
    from distutils.core import run_setup

    import setuptools  # noqa: F401  it provides distutils

    monkeypatch.chdir(ROOT)
    return run_setup("setup.py", stop_after="init")


def test_four_trees_are_one_package(distribution):
    assert set(TREES.values()) <= set(distribution.packages)
    assert all(name == "lsys" or name.startswith("lsys.") for name in distribution.packages), distribution.packages


def test_every_source_file_is_in_a_package(distribution):
    for tree, package in TREES.items():
        for path in (ROOT / tree).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / tree).parts
            name = ".".join([package, *inside])
            assert name in distribution.packages, f"{path.relative_to(ROOT)}: {name} lacks an __init__.py"


def test_version_is_the_packages(distribution):
    assert distribution.get_version() == importlib.import_module("lsys").__version__


def test_every_requirement_is_pinned(distribution):
    pinned = re.findall(r"^([\w.-]+)(?:==\S+$|>=\S+,<\S+ )", (ROOT / "constraints.txt").read_text(), re.M)
    names = {re.sub("[-_.]+", "-", name).lower() for name in pinned}
    wanted = [*distribution.install_requires, *(r for extra in distribution.extras_require.values() for r in extra)]
    missing = {re.split("[<>=!~;[]", each)[0] for each in wanted}
    missing = {name for name in missing if re.sub("[-_.]+", "-", name).lower() not in names}
    assert not missing, f"constraints.txt lacks {sorted(missing)}"


def test_imports_from_another_folder_and_nothing_bare(tmp_path):
    code = (
        "import importlib.util as u, lsys, lsys.kernels, lsys.parallel, lsys.launch\n"
        "for name in ('kernels', 'parallel', 'launch'): print(getattr(u.find_spec(name), 'origin', None))"
    )
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(ROOT / "") not in found.replace(str(ROOT / ".venv"), ""), found
