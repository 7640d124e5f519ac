"""The plain model beside which a step is timed: what it has not is refused, not timed."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lsys.config.load import load
from lsys.config.model import Model
from lsys.config.overrides import parse_overrides

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.step import PlainModel

    return PlainModel


def model(*words: str) -> Model:
    return load(ROOT / "configs" / "quickstart.yaml", parse_overrides([*words])).model


@pytest.mark.parametrize("words", [[], ["--model.mixers.lightning.decay", "false"], ["--model.pattern", "S"]], ids=str)
def test_what_it_has_is_built(plain: Any, words: list[str]) -> None:
    assert plain(model(*words)).layers


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model.mixers.dense.activation", "geglu"], "model.mixers.dense.activation geglu"),
        (["--model.mixers.dense.activation", "sglu"], "model.mixers.dense.activation sglu"),  # parameters are as many
        (["--model.mixers.lightning.lrpe", "all"], "model.mixers.lightning.lrpe all"),
        (["--model.mixers.lightning.lrpe", "first"], "model.mixers.lightning.lrpe first"),
        (["--model.mixers.lightning.norm", "srms"], "model.mixers.lightning.norm srms"),
        (["--model.pattern", "LWRS", "--model.window", "9"], "window layers, retention layers: the plain model has"),
        (["--model.channels", "F-"], "none channels"),
        (["--model.tied", "false"], "parameters for"),
        (["--model.qk-norm", "false"], "parameters for"),
    ],
    ids=str,
)
def test_what_it_has_not_is_refused(plain: Any, words: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plain(model(*words))


def test_the_command_refuses_it_in_one_sentence(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from bench import step

    text = (ROOT / "configs" / "quickstart.yaml").read_text()
    file = tmp_path / "phased.yaml"
    file.write_text(text.replace("\nmodel:\n", "\nmodel:\n  mixers: {lightning: {lrpe: all}}\n"))
    monkeypatch.setattr(sys, "argv", ["step.py", str(file)])
    with pytest.raises(SystemExit):
        step.main()
    assert "phased.yaml: model.mixers.lightning.lrpe all: the plain model has" in capsys.readouterr().err
