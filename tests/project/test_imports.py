"""Imports go down only, and the lower trees need no more packages than they say."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = ("kernels", "parallel", "launch")


def _contracts(folder: Path, extra: str = "") -> subprocess.CompletedProcess[str]:
    """lint-imports over the four trees laid out as one package in `folder`; `extra` is added as a module of lsys.kernels."""
    package = folder / "lsys"
    package.mkdir()
    for path in [*(ROOT / "lsys").iterdir(), *(ROOT / tree for tree in TREES if not (extra and tree == "kernels"))]:
        (package / path.name).symlink_to(path)
    if extra:
        (package / "kernels").mkdir()
        (package / "kernels" / "__init__.py").touch()
        (package / "kernels" / "planted.py").write_text(extra)
    command = [Path(sys.executable).parent / "lint-imports", "--config", ROOT / "pyproject.toml", "--no-cache"]
    return subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, timeout=120)


def test_contracts_hold(tmp_path):
    result = _contracts(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("statement", ["import lsys.parallel", "import lsys.config", "import megatron.core"])
def test_contracts_notice_a_planted_import(tmp_path, statement):
    result = _contracts(tmp_path, statement)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "lsys.kernels.planted -> " + statement.split()[1].removesuffix(".core") in result.stdout


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
