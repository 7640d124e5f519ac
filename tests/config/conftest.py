"""Modules of a user's own, for tests of what is imported and what is not."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module, which notes in a file that it has been imported; gives its name."""
    monkeypatch.syspath_prepend(tmp_path / "modules")
    made: list[str] = []

    def write(text: str = "", name: str = "") -> str:
        name = name or f"brought_{tmp_path.name}_{len(made)}".replace("-", "_")
        path = tmp_path / "modules" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n" + textwrap.dedent(text))
        made.append(name)
        return name

    return write
