"""Loading: what is read, what is refused, and that every mistake is told at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lsys.config.load import config_hash, dump
from lsys.config.load import load as load_config
from lsys.config.messages import ConfigError
from lsys.config.mixers import Mixers
from lsys.config.model import LinearMixer, Model
from lsys.config.overrides import parse_overrides
from lsys.config.schema import Config
from lsys.mixers.registry import ALL

GOOD = """
model: {layers: 4, hidden: 64, heads: 4, vocab: 257}
data: {corpora: [{path: a}, {path: b, weight: 2}]}
optimizer: {lr: 3e-4, eps: 1E-8, clip: 1.e0}
train: {folder: out, steps: 1e3, batch_tokens: 4_096, micro_batch_tokens: 2048}
"""


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text(text)
        return tmp_path / "run.yaml"

    return write


def load(path: Path, words: Sequence[str] = ()) -> Config:
    return load_config(path, parse_overrides(words))


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert str(caught.value).splitlines() == [str(m) for m in caught.value.mistakes]
    return [str(m) for m in caught.value.mistakes]


def test_numbers_with_exponents_are_numbers(file) -> None:
    config = load(file(GOOD))
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip) == (3e-4, 1e-8, 1.0)
    assert (config.train.steps, config.train.batch_tokens) == (1000, 4096)


def test_overrides(file) -> None:
    words = "--parallel.tensor 2 --model.qk-norm=false --data.corpora.1.path c --train.z_loss 1e-4"
    words += " --model.linear.decay false"
    config = load(file(GOOD), words.split())
    assert (config.parallel.tensor, config.model.qk_norm, config.train.z_loss, config.model.linear.decay) == (
        2,
        False,
        1e-4,
        False,
    )
    assert [str(corpus.path) for corpus in config.data.corpora] == ["a", "c"]
    assert load(file(GOOD), ["--data.corpora", "[{path: z}]"]).data.corpora[0].path == Path("z")
    assert len(load(file(GOOD), ["--data.corpora.2.path", "z"]).data.corpora) == 3
    assert load(file(GOOD), ["--model.groups", "2", "--model.groups", "null"]).model.groups is None


def test_an_override_repairs_a_wrong_file(file) -> None:
    path = file(GOOD.replace("layers: 4", "layers: none"))
    assert mistakes(path)[0].startswith("model.layers: 'none'")
    assert load(path, ["--model.layers", "4"]).model.layers == 4


def test_every_mistake_at_once(file) -> None:
    path = file(
        """
model: {layers: 0, hidden: 64, heads: 4, vocab: 257, tensor: 2}
parallel: {tensr: 2, context: x}
data: {corpora: [{pth: a}]}
optimizer: {lr: .inf, schedule: cos}
train: {folder: out, steps: 3, batch_tokens: 4096}
checkpoint: {resume: 5}
modle: 3
"""
    )
    found = {
        line.split(": ")[0]: line
        for line in mistakes(path, "--train.warmup", "3", "--data.corpora.4.path", "x", "--train.sed")
    }
    assert found.keys() == {
        "model.layers", "model.tensor", "parallel.tensr", "parallel.context", "data.corpora.0.path",
        "data.corpora.0.pth", "data.corpora.4.path", "optimizer.lr", "optimizer.schedule",
        "train.micro_batch_tokens", "train.warmup", "train.sed",
        "checkpoint.resume", "modle",
    }  # fmt: skip
    assert found["parallel.tensr"] == "parallel.tensr: unknown key; did you mean tensor?"
    assert found["model.tensor"] == "model.tensor: unknown key; did you mean parallel.tensor?"
    assert found["modle"] == "modle: unknown key; did you mean model?"
    assert found["model.layers"] == "model.layers: 0 does not do: it should be greater than 0 (Number of layers)"
    assert "take an index from 0 to 1" in found["data.corpora.4.path"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: {layers: 1, layers: 2}", "line 1, column 20 is not YAML: the key 'layers' is given twice"),
        ("train: {}\nmodel: {}\ntrain: {}", "line 3, column 1 is not YAML: the key 'train' is given twice"),
        ("model: [", "is not YAML"),
        ("model: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("", "is not a mapping of sections"),
        ("- model", "is not a mapping of sections"),
    ],
)
def test_files_that_are_no_configuration(file, text: str, part: str) -> None:
    (line,) = mistakes(file(text))
    assert part in line


def test_sections_that_are_no_mapping(file) -> None:
    assert load(file(GOOD + "checkpoint:\n")).checkpoint.keep == 2
    line = "parallel: 3 does not do: it should be a mapping (Degrees of parallelism)"
    assert mistakes(file(GOOD + "parallel: 3\n")) == [line]


def test_a_list_wants_brackets(file) -> None:
    (line,) = mistakes(file(GOOD), "--train.profile.ranks", "0")
    assert line.startswith("train.profile.ranks: 0 does not do: it should be a list in brackets, such as [a, b]")


def test_missing_file(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path / "no.yaml")
    assert "no.yaml cannot be read: No such file" in line


@pytest.mark.parametrize("words", [["parallel.tensor", "2"], ["--tensor", "2"], ["--parallel..tensor", "2"]])
def test_words_that_are_no_override(file, words: list[str]) -> None:
    assert "is no option" in mistakes(file(GOOD), *words)[0]


def test_override_below_a_value(file) -> None:
    assert mistakes(file(GOOD), "--model.layers.x", "1") == [
        "model.layers.x: model.layers is 4, which has no keys; override model.layers itself"
    ]


def test_dump_is_stable_and_says_the_same_run(file, tmp_path: Path) -> None:
    config = load(file(GOOD))
    text = dump(config)
    again = load(file(text))
    assert dump(again) == text and config_hash(again) == config_hash(config)
    assert (again.model.groups, again.model.head_dim, again.model.ffn, again.model.linear.heads) == (4, 16, 192, 4)
    assert config_hash(load(file(text), ["--train.seed", "1"])) != config_hash(config)
    wsd = load(file(text), ["--optimizer.schedule", "wsd"])
    assert load(file(dump(wsd))).optimizer.decay_steps == 200


VARIANTS = [
    "--model.mixers.far.kind",
    "window",
    "--model.mixers.far.window",
    "3",
    "--model.pattern",
    "[far, softmax, L]",
]


def test_variants_of_mixers_by_file_and_command_line(file, tmp_path: Path) -> None:
    config = load(
        file(GOOD.replace("vocab: 257}", "vocab: 257, window: 9, mixers: {section: {kind: window}}}")), VARIANTS
    )
    assert config.model.kinds == ("far", "softmax", "lightning", "far")
    windows = {name: vars(config.model.card(name).exchanges(1)[0])["mask"].window for name in ("far", "section")}
    assert windows == {"far": 3, "section": 9}  # a method of the configuration is called section, too
    (tmp_path / "again.yaml").write_text(dump(config))
    assert dump(load(tmp_path / "again.yaml")) == dump(config)


def test_wrong_variants_and_keys_that_have_moved_are_told(file) -> None:
    wrong = "vocab: 257, linear: {gate_rank: 3}, mixers: {gla: {gate_rank: 4}, far: {kind: wind}, 3: {}, near: {kind: window, windo: 1}}}"
    found = mistakes(file(GOOD.replace("vocab: 257}", wrong)))
    (twice,) = found
    assert twice.startswith("model.linear.gate_rank: 3 does not do: it is given as model.mixers.gla.gate_rank too")
    found = mistakes(file(GOOD.replace("vocab: 257}", wrong.replace("gate_rank: 3", "lrpe: x"))))
    for part in (
        "model.linear.lrpe: 'x' does not do",
        "model.mixers.far: {'kind': 'wind'} does not do: kind 'wind' is no mixer; did you mean window? A variant says kind: NAME, of softmax",
        "model.mixers.3: {} does not do: a name of a variant is of small letters",
        "model.mixers.near.windo: unknown key; did you mean window?",
    ):
        assert any(line.startswith(part) for line in found), found


@pytest.mark.parametrize(
    ("mixers", "told"),
    [
        ("lightnng: {decay: false}", "model.mixers.lightnng: {'decay': False} does not do: unknown key; did you mean lightning? A variant says"),
        ("far: {kind: window, hidden: 3}", "model.mixers.far.hidden: unknown key; did you mean model.hidden?"),
        ("far: {kind: gla, xyz: 3}", "model.mixers.far.xyz: unknown key; there are heads, head_dim, key_heads, key_dim, gate_rank, kind"),
        ("far: {kind: window, window: 0}", "model.mixers.far.window: 0 does not do: it should be greater than 0 (Tokens that a query sees"),
    ],
)  # fmt: skip
def test_mistakes_in_variants_have_their_remedies(file, mixers: str, told: str) -> None:
    (found,) = mistakes(file(GOOD.replace("vocab: 257}", f"vocab: 257, mixers: {{{mixers}}}}}")))
    assert found.startswith(told)


def test_keys_that_have_moved_are_read_from_sections_made_in_python() -> None:
    sizes: dict[str, Any] = dict(layers=2, hidden=64, heads=4, vocab=257, pattern="LG")
    linear, window = LinearMixer(decay=False, gate_rank=3), ALL["window"].Options.model_validate({"window": 3})
    for mixers in ({}, {"window": {"window": 3}}, {"window": window}, Mixers(window=window)):
        found = Model(**sizes, linear=linear, mixers=mixers).mixers  # type: ignore[arg-type]
        assert (found.lightning.decay, found.gla.gate_rank) == (False, 3)
        assert found.window.window == (3 if mixers else None)
    beside = Mixers(lightning=ALL["lightning"].Options.model_validate({"norm": "srms"}))
    lightning = Model(**sizes, linear=linear, mixers=beside).mixers.lightning
    assert (lightning.decay, lightning.norm) == (False, "srms")
    with pytest.raises(ValueError, match=r"it is given as model\.mixers\.gla\.gate_rank too"):
        Model(**sizes, linear=linear, mixers=Mixers(gla=ALL["gla"].Options.model_validate({"gate_rank": 4})))
