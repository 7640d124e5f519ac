"""The modules that cards name are missed where an import would miss them, and are not imported for that."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from config.test_declared import Plain, config_of, plain
from pydantic_core import PydanticCustomError

from lsys.config.load import dump
from lsys.config.modules import missing_modules
from lsys.config.user_code import imported

NOTE = "open(__file__ + '.ran', 'w').close()\n"  # tells that it has run
MODULE = (
    NOTE
    + """
if True:
    from os import path as Imported
try:
    import json as Renamed
except ImportError:
    Renamed = None
class Mixer:
    Inner = 1
    def method(self):
        Local = 2
(First, Second), Third = (1, 2), 3
"""
)

# Files by their names, the path of a module in them, and what is seen of it; "" is nothing wrong.
CASES: dict[str, tuple[dict[str, str], str, str]] = {
    "a class": ({"mod.py": MODULE}, "mod:Mixer", ""),
    "in a package": ({"pack/__init__.py": NOTE, "pack/sub/__init__.py": NOTE, "pack/sub/mod.py": MODULE}, "pack.sub.mod:Mixer", ""),
    "in a folder without __init__": ({"folder/mod.py": MODULE}, "folder.mod:Mixer", ""),
    "an import": ({"mod.py": MODULE}, "mod:Imported", ""),
    "an import with another name": ({"mod.py": MODULE}, "mod:Renamed", ""),
    "a place in a tuple": ({"mod.py": MODULE}, "mod:Second", ""),
    "a star": ({"mod.py": NOTE + "from os import *\n"}, "mod:getcwd", ""),
    "made by a function": ({"mod.py": NOTE + "globals()['Made'] = 1\n"}, "mod:Made", ""),
    "a package that says where it is": (
        {"pack/__init__.py": NOTE + "__path__ += [__path__[0] + '/more']\n", "pack/more/mod.py": MODULE}, "pack.mod:Mixer", ""
    ),
    "compiled": ({}, "_socket:socket", ""),
    "no module": ({}, "nowhere_at_all:Mixer", "there is no module nowhere_at_all among installed packages"),
    "no module in a package": ({"pack/__init__.py": NOTE}, "pack.nowhere:Mixer", "there is no module pack.nowhere among"),
    "no module in a folder": ({"folder/mod.py": MODULE}, "folder.nowhere:Mixer", "there is no module folder.nowhere among"),
    "below what is no package": ({"mod.py": MODULE, "sub.py": MODULE}, "mod.sub:Mixer", "there is no module mod.sub among"),
    "no such name": ({"mod.py": MODULE}, "mod:Mixr", "module mod has no Mixr; did you mean Mixer?"),
    "inside a class": ({"mod.py": MODULE}, "mod:Inner", "module mod has no Inner"),
    "inside a function": ({"mod.py": MODULE}, "mod:Local", "module mod has no Local"),
    "used, never bound": ({"mod.py": NOTE + "print\n"}, "mod:print", "module mod has no print"),
    "no Python": ({"mod.py": NOTE + "class Mixer(\n"}, "mod:Mixer", "importing mod would fail at its line 2: SyntaxError: '(' was never closed"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where modules are found that a test writes; they are forgotten after it."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("mod", "pack", "folder"):
        for each in [each for each in sys.modules if each.split(".")[0] == name]:
            del sys.modules[each]


@pytest.mark.parametrize("case", CASES)
def test_what_is_seen_is_what_an_import_finds(folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    files, path, said = CASES[case]
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(Plain, "module", path)
    found = [str(mistake) for mistake in missing_modules(config_of(one=plain()))]
    assert not [*folder.rglob("*.ran")]
    if not said:
        assert found == [] and imported(path) is not None
        return
    assert len(found) == 1 and found[0].startswith(f"model.mixers.one.kind: the module of Plain, {path}: {said}")
    with pytest.raises(PydanticCustomError):
        imported(path)


def test_lsys_check_tells_it(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from lsys.cli import main
    from lsys.launch.preflight.facts import _configuration
    from lsys.launch.preflight.report import Report

    text = dump(config_of(one=plain(), two=plain(span=3)))
    (folder / "run.yaml").write_text(text)
    words = ["check", str(folder / "run.yaml"), "--world-size", "1"]
    assert main(words) == 0 and yaml.safe_load(capsys.readouterr().out.partition("# sha256")[0]) == yaml.safe_load(text)
    monkeypatch.setattr(Plain, "module", "my_parts.mixers:FeatureMixr")
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [line.strip() for line in lines] == [
        f"model.mixers.{key}.kind: the module of Plain, my_parts.mixers:FeatureMixr: "
        "module my_parts.mixers has no FeatureMixr; did you mean FeatureMixer?"
        for key in ("one", "two")
    ]
    report = Report("node", "address")
    _configuration(report, str(folder / "run.yaml"), ())
    assert report.mistakes == [line.strip() for line in lines]
