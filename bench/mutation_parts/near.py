"""Which tests look at a source most closely: these run first, and a fault that they catch costs seconds."""

import ast
from functools import cache
from pathlib import Path

# The first reads the places of known faults in the sources: what is planted there would be noticed always. The second wants lsys installed.
NO_JUDGES = ("test_mutations.py", "test_packaging.py")
NEAR = 3
LAST = ("project", "bench")  # they read the tree or start programs: slow, and seldom the first to notice


def in_order(root: Path, file: str, nearest: bool = False) -> list[str]:
    """All test files of the checkout that may judge a fault, relative, the nearest to a source first: those that import it, directly or by what
    they share; then those of its package; then, but for the `nearest`, the rest."""
    module, parts = module_of(file), Path(file).parts
    package = parts[1] if parts[0] == "lsys" and len(parts) > 2 else parts[0]
    tests = sorted(path.relative_to(root) for path in (root / "tests").rglob("test_*.py") if path.name not in NO_JUDGES)

    other = ("triton",) if "gpu" in file else ()

    def distance(test: Path) -> tuple[int, bool, bool, int]:
        direct = module in _imports(root / test)
        shared = any(module in _imports(path) for path in _support(root, root / test))
        here = test.parts[1] == package
        step = 0 if direct and here else 1 if direct else 2 if shared and here else 3 if here else 4 if shared else 5
        named = any(name in test.stem for name in (Path(file).stem, Path(file).parent.name, *other))
        slow = test.parts[1] in LAST or ("triton" in test.stem and "gpu" not in file)  # in Triton's interpreter
        return step, slow, not named, (root / test).stat().st_size

    ordered = sorted(tests, key=distance)
    return [str(test) for test in ordered if not nearest or distance(test)[0] <= NEAR] or in_order(root, file)


def module_of(file: str) -> str:
    """The module's name of a source: kernels, parallel and launch are lsys's packages."""
    parts = list(Path(file).with_suffix("").parts)
    parts = parts if parts[0] == "lsys" else ["lsys", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _imports(path: Path) -> frozenset[str]:
    """Modules that a file names in imports, and what it takes from packages as if that were modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def _support(root: Path, path: Path) -> list[Path]:
    names = (name.partition(".")[2] for name in _imports(path) if name.startswith("support."))
    return [found for name in names if (found := root / "tests" / "support" / f"{name}.py").exists()]
