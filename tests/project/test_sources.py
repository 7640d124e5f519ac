"""Rules for all source files."""

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
