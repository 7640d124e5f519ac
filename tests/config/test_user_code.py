"""Code of the user's own: what its paths are refused for, and that only what the user names is imported, whatever a file says."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.own_code import CARD_TEXT, FEATURE

from lsys.config.load import dump, load
from lsys.config.messages import ConfigError, FilesError
from lsys.config.notices import notices
from lsys.config.overrides import parse_overrides
from lsys.config.rules import check
from lsys.config.schema import Config
from lsys.observe.flops import flops_per_token, parameters
from lsys.predict.hardware import hardware
from lsys.predict.plan import Plan

MINE = {"pattern": ["mine", "softmax"], "mixers": {"mine": {"kind": FEATURE}}}
TREE: dict[str, Any] = {
    "model": {"layers": 2, "hidden": 64, "heads": 4, "vocab": 257},
    "data": {"corpora": [{"path": "a"}]},
    "train": {"folder": "out", "steps": 10, "batch_tokens": 4096, "micro_batch_tokens": 2048},
}


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., str]:
    """All mistakes of a configuration whose sections are changed, in one text."""

    def of(**changes: dict[str, Any]) -> str:
        tree = {**TREE, **{key: {**TREE.get(key, {}), **section} for key, section in changes.items()}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / "run.yaml")
        return str(caught.value)

    return of


def read(tmp_path: Path, *words: str, **changes: dict[str, Any]) -> Config:
    tree = {**TREE, **{key: {**TREE.get(key, {}), **section} for key, section in changes.items()}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return load(tmp_path / "run.yaml", parse_overrides(words), lambda config: check(config, 2))


# ---- what is refused


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a b:c", "is named package.module:name"),
        ("my_parts/cards.py:FeatureAttention", "is named package.module:name"),
        ("my_parts.cards:", "is named package.module:name"),
        ("no_such:Card", "there is no module no_such among installed packages and in PYTHONPATH (empty); install its package, or set"),
        ("my_parts.no_such:Card", "there is no module my_parts.no_such among"),
        ("my_parts.cards:FeatureAttnetion", "module my_parts.cards has no FeatureAttnetion; did you mean FeatureAttention?"),
        ("my_parts.cards:Kept", "is not a mixer's card: it has to be a subclass of StateCard, AttentionCard, ChannelCard"),
        ("os:path", "is not a mixer's card"),
        ("lsys.mixers.state:StateCard", "it lacks name, title, module, decay, kept, parts"),
        ("lsys.mixers.lightning:Lightning", "its name 'lightning' has to be of small letters, digits and _, and none of softmax"),
        ("my_parts.mixers:FeatureMixer", "is not a mixer's card"),
    ],
)  # fmt: skip
def test_a_path_that_is_no_card(told: Any, monkeypatch: pytest.MonkeyPatch, path: str, said: str) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    text = told(model={"pattern": ["mine"], "mixers": {"mine": {"kind": path}}})
    assert text.startswith(f"model.mixers.mine.kind: '{path}' does not do: ") and said in text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("letter = 'Q'", "its letter is 'Q'"),
        ("module = 'here'", "its module is 'here'; it has to be package.module:Class"),
        ("Options = dict", "its Options have to be a subclass of lsys.section.Section"),
        ("name = 'Two Words'", "its name 'Two Words' has to be of small letters"),
        ("title = None", "it lacks title"),
        ("class Options(StateOptions):\n        kind: str = ''", "its Options have a key `kind`"),
    ],
)
def test_a_card_that_does_not_do(told: Any, module: Any, line: str, said: str) -> None:
    name = module(f"{CARD_TEXT}\nclass Mine(Base):\n    {line}\n")
    assert said in told(model={"pattern": ["mine"], "mixers": {"mine": {"kind": f"{name}:Mine"}}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("\nraise SystemExit(3)", "line 3: SystemExit: 3"),
        ("def f(:", "line 2: SyntaxError"),
        ("import no_such_thing", "line 2: ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_module_that_fails_is_told_with_its_line(told: Any, module: Any, text: str, said: str) -> None:
    name = module(text)
    assert f"importing {name} failed at " in (found := told(optimizer={"schedule": f"{name}:f"}))
    assert said in found and f"{name}.py, line" in found


def test_each_key_says_what_it_wants(told: Any) -> None:
    text = told(
        optimizer={"kind": "adam", "schedule": "linear", "distributed": False},
        train={"observers": ["my_parts.training:inverse_root", "Log"], "loss": "entropy"},
    )
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    assert "it should be 'adamw' or an optimizer of your own is named package.module:name" in lines["optimizer.kind"]
    assert "it should be 'cosine', 'wsd', 'constant' or a schedule of your own" in lines["optimizer.schedule"]
    assert "or a loss of your own is named package.module:name" in lines["train.loss"]
    assert "has to be a subclass of lsys.train.observers.StepObserver" in lines["train.observers.0"]
    assert "an observer of your own is named" in lines["train.observers.1"]


@pytest.mark.parametrize(
    ("section", "key", "value", "is_local"),
    [
        ("optimizer", "schedule", "linear", False),
        ("optimizer", "schedule", "a b:c", False),
        ("model", "mixers", {"mine": {"kind": "a-b:c"}}, False),
        ("optimizer", "schedule", "no_such:f", True),
        ("optimizer", "schedule", "math:no_such", True),
        ("model", "mixers", {"mine": {"kind": "os:path"}}, True),
    ],
)
def test_what_no_node_has_otherwise_is_told_once(
    tmp_path: Path, section: str, key: str, value: Any, is_local: bool
) -> None:
    """A name that is no path is a mistake of the YAML, alike on all ranks; a module is a node's own."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**TREE, section: {**TREE.get(section, {}), key: value}}))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "run.yaml")
    assert caught.value.everywhere is not is_local and isinstance(caught.value, FilesError) == is_local
    assert str(caught.value).startswith(f"{section}.{key}")


def test_a_schedule_that_fails_on_one_node_is_told_there(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    from lsys.cli import main

    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, GROUP_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    for text, said in (
        ("def f(step): raise OSError('no table')", "(0) raised OSError: no table"),
        ("def f(step): return -1", "(0) is -1; a factor of"),
        ("asked = []\ndef f(step): return len(asked.append(0) or asked)", "is 1, then 2"),
    ):
        path = f"{module(text)}:f"
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**TREE, "optimizer": {"schedule": path}}))
        assert main(["train", str(tmp_path / "run.yaml")]) == 2
        head, *lines = capsys.readouterr().err.splitlines()
        (line,) = (line for line in lines if "optimizer.schedule" in line)  # beside the corpus, which is not there
        assert head.startswith("lsys, rank 1: ") and line.startswith(f"  optimizer.schedule: {path}") and said in line


def test_all_is_told_at_once_and_the_folder_that_has_it_is_named(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere.py").write_text("")
    monkeypatch.chdir(tmp_path)
    text = told(model={"layers": 0, "tensr": 2}, train={"observers": ["elsewhere:Log", "os:no_such"]})
    keys = [line.split(": ")[0] for line in text.splitlines()]
    assert keys == ["model.layers", "model.tensr", "train.observers.0", "train.observers.1"]
    assert f"set PYTHONPATH={tmp_path} on every node" in text


def test_an_own_optimizer_has_whole_states(tmp_path: Path) -> None:
    own = {"kind": "my_parts.training:lion"}
    with pytest.raises(ConfigError, match="optimizer.distributed: true shards the states of adamw; .* false does"):
        read(tmp_path, optimizer=own)
    assert read(tmp_path, optimizer=own | {"distributed": False}).optimizer.moments == 1


@pytest.mark.parametrize("states", ["'two'", "-1", "1.5", "[2]", "float('nan')"])
def test_how_many_states_an_own_optimizer_keeps(told: Any, module: Any, states: str) -> None:
    path = f"{module(f'def make(groups, options): ...{chr(10)}make.states = {states}')}:make"
    text = told(optimizer={"kind": path, "distributed": False})
    assert text.startswith(f"optimizer.kind: '{path}' does not do: {path} is not an optimizer: its `states` is ")
    assert "has to be how many numbers it keeps for each of a parameter: 0 or more" in text and "\n" not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(step): return -1.0", "(0) is -1.0; a factor of optimizer.lr is a number of 0 or more"),
        ("def f(step): return float('nan') if step == 9 else 1", "(9) is nan; a factor"),
        ("def f(step): return 'x'", "(0) is 'x'; a factor"),
        ("def f(step): return [1, 2][step]", "(4) raised IndexError: list index out of range; it takes each step from 0 to 9"),
        ("def f(): return 1", "(0) raised TypeError"),
        ("asked = []\ndef f(step): return len(asked.append(0) or asked)", "is 1, then 2; a factor follows from the step alone"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_do(tmp_path: Path, module: Any, text: str, said: str) -> None:
    name = module(text)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, optimizer={"schedule": f"{name}:f"})
    assert f"optimizer.schedule: {name}:f" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        (f"{CARD_TEXT}\nimport torch", "model.mixers.mine.kind", "imports torch; a mixer's card is read by commands that answer at once"),
        ("import megatron.core\ndef f(step): return 1", "optimizer.schedule", "imports megatron.core, which lsys prepares first; begin"),
    ],
)  # fmt: skip
def test_a_module_that_imports_what_it_must_not(module: Any, tmp_path: Path, text: str, key: str, said: str) -> None:
    """In a process of its own, where nothing has imported it before."""
    name = module(text)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TREE))
    words = [
        "check",
        str(tmp_path / "run.yaml"),
        "--world-size",
        "1",
        f"--{key}",
        f"{name}:{'Base' if 'mixers' in key else 'f'}",
    ]
    path = [str(tmp_path / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    found = subprocess.run([sys.executable, "-m", "lsys", *words], capture_output=True, text=True, env=environment)
    assert found.returncode == 2 and key in found.stderr and said in found.stderr, found.stderr


# ---- what works with it


def test_a_card_of_ones_own_is_as_another(tmp_path: Path) -> None:
    config = read(tmp_path, "--model.mixers.mine.shift", "2", model=MINE)
    softmax, mine = config.model.cards.values()
    assert (mine.key, mine.own.shift, softmax.key) == ("mine", 2.0, "softmax")
    assert (
        parameters(config.model)["mine mixer"] == mine.products and flops_per_token(config.model, 8)["mine attention"]
    )
    machine = hardware("h100x8", "bf16", cards=config.model.cards.values())
    assert Plan(config, 2, machine).prediction.seconds > 0
    with pytest.raises(ConfigError, match="has no rates for mine layers; for mixers of your own .* name a GPU"):
        assert Plan(config, 2, hardware("h100x8", "bf16")).prediction
    (tmp_path / "again.yaml").write_text(dump(config))
    assert dump(load(tmp_path / "again.yaml")) == dump(config)
    assert not notices(config, 2)
    sizes = read(tmp_path, model=MINE | {"pattern": ["mine"], "linear": {"heads": 2}, "groups": 2})
    assert [text.split(" has")[0] for text in notices(sizes, 2)] == ["model.groups"]  # `linear.heads` has an effect


def test_keys_without_effect_beside_an_own_schedule(tmp_path: Path) -> None:
    path = "my_parts.training:inverse_root"
    config = read(tmp_path, optimizer={"schedule": path, "warmup_steps": 2, "min_lr": 1e-5, "decay_steps": 3})
    found = [text.split(" has")[0] for text in notices(config, 2)]
    assert {"optimizer.warmup_steps", "optimizer.min_lr", "optimizer.decay_steps"} <= {*found}


def test_the_command_line_may_name_it(tmp_path: Path) -> None:
    config = read(tmp_path, "--model.mixers.mine.kind", FEATURE, "--model.pattern", "[mine]", "--train.observers", "[]")
    assert [*config.model.cards] == ["mine"]
