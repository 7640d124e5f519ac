"""docs/configuration.md is what the schema generates."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from lsys.config.load import load
from lsys.config.notices import notices
from lsys.config.reference import main, reference
from lsys.config.rules import check
from lsys.config.schema import Config

ROOT = Path(__file__).parents[2]


def test_the_reference_is_up_to_date() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == reference(), "run: python -m lsys.config.reference docs/configuration.md"


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "configuration.md")])
    assert (tmp_path / "configuration.md").read_text() == reference() and not capsys.readouterr().out
    main([])
    assert capsys.readouterr().out == reference()


def test_the_reference_has_every_key() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(section.model_fields) for section in sections(Config)) - len(Config.model_fields)
    assert "| `tensor` | integer > 0 | `1` |" in reference()


def sections(section: type[BaseModel]) -> list[type[BaseModel]]:
    found = [section]
    for field in section.model_fields.values():
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found += sections(inner)
    return found


@pytest.mark.parametrize(
    ("name", "world_size"), [("quickstart", 2), ("hybrid_1b", 64), ("delta_1b", 64), ("hybrid_7b_256k", 512)]
)
def test_recipes_pass(name: str, world_size: int) -> None:
    config = load(ROOT / "configs" / f"{name}.yaml")
    assert check(config, world_size) == []
    assert notices(config, world_size) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_explained(path: Path) -> None:
    assert [line for line in path.read_text().splitlines() if ": " in line and "# " not in line] == []
