"""Imports go down only, and the lower trees need no more packages than they say."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = ("kernels", "parallel", "launch")


def _contracts(folder: Path, planted: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """lint-imports over a copy of the source tree; `planted`: statements by the path of a new module."""
    for tree in ("lsys", *TREES):
        shutil.copytree(ROOT / tree, folder / tree, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path, statement in planted.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(statement + "\n")
        (folder / path).parent.joinpath("__init__.py").touch()
    command = [Path(sys.executable).parent / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache"]
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=120)


def test_contracts_hold(tmp_path: Path) -> None:
    result = _contracts(tmp_path, {})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("kernels/planted.py", "import lsys.parallel"),
        ("kernels/planted.py", "import lsys.config"),
        ("kernels/planted.py", "import megatron.core"),
        ("lsys/predict/planted.py", "import torch"),
        ("lsys/predict/planted.py", "from lsys.train.run import main"),
        ("lsys/data/planted.py", "import lsys.generate"),
        ("lsys/config/planted.py", "import lsys.inspection"),
        ("lsys/options.py", "import lsys.predict"),
        ("launch/planted.py", "import torch"),
    ],
)
def test_contracts_notice_a_planted_import(tmp_path: Path, path: str, statement: str) -> None:
    result = _contracts(tmp_path, {path: statement})
    assert result.returncode == 1, result.stdout + result.stderr
    module = path.removesuffix(".py").replace("/", ".")
    module = module if module.startswith("lsys") else f"lsys.{module}"
    assert f"{module} -> {statement.split()[1].removesuffix('.core')}" in result.stdout


def test_a_package_without_a_floor_is_noticed(tmp_path: Path) -> None:
    result = _contracts(tmp_path, {"lsys/planted/module.py": ""})
    assert result.returncode == 1 and "lsys.planted" in result.stdout, result.stdout + result.stderr


def test_links_show_one_package() -> None:
    for tree in TREES:
        link = ROOT / "lsys" / tree
        assert link.is_symlink() and link.resolve() == (ROOT / tree).resolve()


def _imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("tree", "allowed"),
    [("kernels", {"lsys", "torch", "triton"}), ("parallel", {"lsys", "torch"}), ("launch", {"lsys"})],
)
def test_packages_that_a_tree_needs(tree, allowed):
    for path in (ROOT / tree).rglob("*.py"):
        others = _imported(path) - allowed - sys.stdlib_module_names
        assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}; {tree}/ may import {sorted(allowed)}"


def test_model_code_leaves_communication_to_others():
    for path in (ROOT / "lsys" / "model").rglob("*.py"):
        assert "torch.distributed" not in path.read_text(), path.relative_to(ROOT)
