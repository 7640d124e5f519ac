"""Rules for all source files."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("lsys", "kernels", "parallel", "launch", "tests", "bench")
LINES = 400


def _sources() -> list[Path]:
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def test_no_long_files():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in _sources()}
    long = {name: lines for name, lines in long.items() if lines > LINES}
    assert not long, f"files of more than {LINES} lines: {long}"


def test_names_of_test_modules_are_unique():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    repeated = sorted({name for name in names if names.count(name) > 1})
    assert not repeated, f"several test modules are called {repeated}"


def test_docstrings_begin_with_what_is_there():
    """Not with "Of ...", whose subject a reader must find in the signature."""
    found = []
    for path in (path for path in _sources() if "tests" not in path.parts):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                words = (ast.get_docstring(node) or "").split()
                if words and words[0] in ("Of", "of"):
                    found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)} {' '.join(words[:6])}")
    assert not found, "\n".join(found)


def test_files_that_pages_name_are_there():
    """From the root, from lsys, from the page's folder, or from the folder of another file that the page names."""
    pages = [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "kernels").rglob("*.md"),
    ]
    missing = []
    for page in pages:
        names = sorted(
            {name for name in re.findall(r"`([\w./-]+\.(?:py|sh|md|yaml))`", page.read_text()) if "NAME" not in name}
        )
        homes = [ROOT, ROOT / "lsys", page.parent]
        homes += [
            (home / name).parent for home in tuple(homes) for name in names if "/" in name and (home / name).exists()
        ]
        missing += [
            f"{page.relative_to(ROOT)}: {name}" for name in names if not any((home / name).exists() for home in homes)
        ]
    assert len(pages) > 20 and not missing, "\n".join(missing)
