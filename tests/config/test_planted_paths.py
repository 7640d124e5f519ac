"""Only what the user names is imported, whatever a checkpoint, its configuration or a baseline says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import parity
from support.own_code import CARD_TEXT, FEATURE

from lsys.checkpoint.compatible import differences
from lsys.config.load import dump, loads, model_keys
from lsys.config.messages import ConfigError
from lsys.config.mixers import CARD
from lsys.config.schema import Config
from lsys.config.user_code import UserCode


def planted(path: str) -> str:
    """A configuration as a checkpoint holds it, with a path in every place that takes one."""
    tree = yaml.safe_load(dump(parity.settings(model__pattern=["mine"], model__mixers={"mine": {"kind": FEATURE}})))
    tree["model"]["mixers"] = {"mine": {"kind": path}}
    tree["optimizer"] |= {"kind": path, "schedule": path}
    tree["train"] |= {"observers": [path], "loss": path}
    return yaml.safe_dump(tree)


def test_a_planted_path_does_not_run(module: Any, tmp_path: Path) -> None:
    path = f"{module(CARD_TEXT)}:Base"
    text, ran = planted(path), tmp_path / "ran"
    with pytest.raises(ConfigError) as caught:
        loads(text)
    assert str(caught.value).count(f"{path} would run code that your own YAML or command line does not name") == 5
    (found,) = differences(text, parity.settings(model__pattern="L"))
    assert (
        found == f"the model in the checkpoint would run code that your own YAML or command line does not name: {path}"
    )
    own = parity.settings(model__pattern=["mine"], model__mixers={"mine": {"kind": FEATURE}})
    assert path in differences(text, own)[0]  # another path that is named does not let it in
    for validate in (Config.model_validate, lambda tree: model_keys(tree["model"])):
        with pytest.raises(ValueError, match="would run code"):
            validate(yaml.safe_load(text))
    assert not ran.exists()
    code = UserCode([path], needed=(CARD,))
    assert [*loads(text, code).model.cards] == ["mine"] and ran.exists() and not code.refused


def test_generate_refuses_a_planted_path_in_one_sentence(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from lsys.checkpoint.manifest import Cursor, Manifest
    from lsys.cli import main

    path = f"{module(CARD_TEXT)}:Base"
    Manifest(Cursor(2, 8, planted(path)), 1, 1, {}, {}, {}).write(tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "a", "--tokenizer", "bytes"]
    assert main([*words, "--trust", "my_parts.cards:FeatureAttention"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"lsys: the checkpoint's configuration names code that would run, {path}; if you trust it, repeat it: --trust {path}"
    )
    assert not (tmp_path / "ran").exists()
    assert main([*words, "--trust", path]) == 2  # its module is nowhere
    assert "there is no module nowhere" in capsys.readouterr().err and (tmp_path / "ran").exists()


def test_what_is_not_needed_is_not_imported_though_it_is_trusted(module: Any, tmp_path: Path) -> None:
    path = f"{module()}:Anything"
    tree = yaml.safe_load(dump(parity.settings()))
    tree["train"]["observers"] = [path]
    loads(yaml.safe_dump(tree), UserCode([path], needed=(CARD,)))
    assert not (tmp_path / "ran").exists()


def test_a_baseline_does_not_import(module: Any, tmp_path: Path) -> None:
    from lsys.observe.efficiency import BaselineError, Work, kind_of_scaling

    path = f"{module(CARD_TEXT)}:Base"
    own = parity.settings(model__pattern=["mine"], model__mixers={"mine": {"kind": FEATURE}})
    work = Work.of(own)
    assert kind_of_scaling(record(work), work, 1) == "weak"  # what this run names, its baseline may name
    model = json.loads(json.dumps(work.model))
    model["mixers"]["mine"]["kind"] = path
    with pytest.raises(BaselineError, match=f"{path} would run code"):
        kind_of_scaling(record(Work(model, work.precision, work.recompute, work.tokens)), work, 1)
    assert not (tmp_path / "ran").exists()


def record(work: Any) -> Any:
    from lsys.observe.efficiency import Record

    return Record(work, 1, 1.0, 1.0, "here", {}, {}, "")


def changed(old: Any, new: Any) -> list[str]:
    """What a run with the configuration `new` is told to do otherwise than the one that wrote a checkpoint with `old`, or its YAML."""
    from lsys.checkpoint import Cursor, Manifest
    from lsys.checkpoint.changes import changes

    text = old if isinstance(old, str) else dump(old)
    return changes(Manifest(Cursor(2, 2, text), 1, 1, {}, {}, {}), new, 1, 0.01)


def test_a_resumed_run_has_its_own_optimizer_again() -> None:
    own = {"kind": "my_parts.training:lion", "schedule": "my_parts.training:inverse_root", "distributed": False}
    plain = parity.settings(optimizer__distributed=False)
    config = parity.settings(**{f"optimizer__{key}": value for key, value in own.items()})
    assert not differences(dump(config), config) and not changed(config, config)
    assert differences(dump(config), plain) == [
        "optimizer.kind my_parts.training:lion in the checkpoint, adamw in the config"
    ]
    assert f"optimizer.schedule {own['schedule']} -> cosine" in changed(config, plain)
    assert f"optimizer.schedule cosine -> {own['schedule']}" in changed(plain, config)
    tree = yaml.safe_load(dump(plain))
    del tree["train"]["loss"], tree["optimizer"]["schedule"], tree["checkpoint"]["weights"]  # as checkpoints of before
    assert not differences(yaml.safe_dump(tree), plain) and not changed(yaml.safe_dump(tree), plain)


def test_what_the_model_computes_otherwise_is_told() -> None:
    assert changed(parity.settings(model__rope_base=5.0), parity.settings()) == ["model.rope_base 5.0 -> 10000.0"]
    assert not differences(dump(parity.settings(model__rope_base=5.0)), parity.settings())
