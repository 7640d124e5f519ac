"""A run that resumes within a window of its data, at other sizes and on other ranks, and with other data."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support import parity
from support.corpora import write_corpus

from lsys.checkpoint.agreement import RankFailure
from lsys.checkpoint.manifest import CheckpointError, Cursor, Manifest
from lsys.config.load import dump
from lsys.config.messages import ConfigError
from lsys.config.schema import Checkpoint
from lsys.data.corpus import Corpus, CorpusError
from lsys.data.identity import identity
from lsys.data.stream import TokenStream
from lsys.train.position import KEY, refuse_other_data, resumed, stored

VOCAB = 1200  # as many tokens as the corpus has, each once
TINY = {"model__pattern": "S", "model__layers": 1, "model__hidden": 16, "model__heads": 2, "model__groups": 1, "model__ffn": 16,
        "model__vocab": VOCAB, "optimizer__schedule": "constant", "data__validation_fraction": 0.0}  # fmt: skip


def train(
    rank: int, world_size: int, folder: str, steps: int, changes: dict[str, Any]
) -> tuple[list[int], list[int], list[str]]:
    """Tokens that the rank was given, `n_tokens_seen` after each step, what was said; or the refusal, alone."""
    from lsys.config.schema import Metrics
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.observe.reporter import Reporter
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.corpora import open_corpora
    from lsys.train.run import Run

    corpora = [{"path": str(Path(folder) / changes.get("corpus", "corpus"))}]
    own = {key: value for key, value in changes.items() if key != "corpus"}
    config = parity.settings(
        **TINY | {"train__folder": Path(folder) / "run", "train__steps": steps, "data__corpora": corpora} | own
    )
    config = config.model_copy(update={"metrics": Metrics(every=1, waterfall_every=0, tensorboard=False)})
    tokens: list[int] = []
    seen: list[int] = []
    said: list[str] = []
    original = Run._train_step

    def step(self: Any, batches: list[Any], flops: float) -> Any:
        tokens.extend(token for batch in batches for token in batch.tokens[: len(batch.loss_mask)].tolist())
        return original(self, batches, flops)

    def training(self: Any, step: int, interval: Any, values: Any, waterfall: Any = None) -> None:
        seen.append(values["n_tokens_seen"])

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Run, "_train_step", step))
        stack.enter_context(mock.patch.object(Reporter, "training", training))
        stack.enter_context(mock.patch.object(Reporter, "say", lambda self, text: said.append(text)))
        groups = stack.enter_context(process_groups(config.parallel, Launch(rank=rank, world_size=world_size)))
        try:
            Run(config, groups, corpora=open_corpora(config, is_first=not rank)).train()
        except ConfigError as error:
            return [], [], [str(error)]
    return tokens, seen, said


@pytest.fixture
def folder(tmp_path: Path) -> str:
    ends = [0, 7, 8, 300, 341, 700, 702, 1100, VOCAB]
    for name, first in (("corpus", 0), ("other", 1)):
        ids = [(n * 7 + first) % VOCAB for n in range(VOCAB)]
        write_corpus(tmp_path / name, [ids[a:b] for a, b in zip(ends, ends[1:], strict=False)])
    return str(tmp_path)


def sizes(batch: int, micro: int, window: int, **degrees: Any) -> dict[str, Any]:
    named = {f"parallel__{key}": value for key, value in degrees.items()}
    return {"train__batch_tokens": batch, "train__micro_batch_tokens": micro, "data__shuffle_window": window} | named


LEGS = (
    (1, 2, sizes(60, 20, 16)),  # 6 of 16 micro-batches of 20 tokens
    (2, 4, sizes(48, 12, 5)),  # within that window; 8 of its own, of 12
    (4, 7, sizes(84, 21, 0, context=2)),  # within both
)


@pytest.mark.fault("resume at other sizes")
def test_two_resumes_within_a_window_read_every_token_once(gloo: Any, folder: str) -> None:
    found: list[int] = []
    seen: list[int] = []
    notes: list[str] = []
    for ranks, steps, changes in LEGS:
        outcomes = gloo(ranks, train, folder, steps, changes)
        found += [token for tokens, _, _ in outcomes for token in tokens]
        seen += outcomes[0][1]
        notes += outcomes[0][2]
    assert seen == [60, 120, 168, 216, 300, 384, 468]
    # the last leg takes what the windows left in order: no hole
    stream = TokenStream([Corpus.open(f"{folder}/corpus")], [1.0], seed=0, split="train", validation_fraction=0.0)
    assert sorted(found) == sorted(stream.batch(0, 468).tokens.tolist())
    text = "train.batch_tokens 60 -> 48, train.micro_batch_tokens 20 -> 12, data.shuffle_window 16 -> 5: every token is read once"
    assert any(note.startswith(text) for note in notes)
    manifest = json.loads((Path(folder) / "run/checkpoints/step-00000007/manifest.json").read_text())
    assert manifest["cursor"]["tokens"] == 468 and len(manifest["cursor"]["extra"]["data"]["spans"]) <= 3


def test_other_data_is_refused_or_begins_anew_once(gloo: Any, folder: str) -> None:
    same, other = sizes(60, 20, 0), sizes(60, 20, 0) | {"corpus": "other"}
    restart = other | {"data__restart": True}
    [first] = gloo(1, train, folder, 2, same)
    for outcome in gloo(2, train, folder, 4, other | sizes(80, 20, 0)):
        assert outcome[0] == [] and "data.corpora.0.path: " in outcome[2][0] and "data.restart: true" in outcome[2][0]
    [second] = gloo(1, train, folder, 4, restart)
    [third] = gloo(1, train, folder, 6, restart)  # the same YAML goes on
    assert second[1] + third[1] == [180, 240, 300, 360]
    assert len({*second[0], *third[0]}) == 240  # no token of the new data twice
    [straight] = gloo(1, train, folder + "/straight", 4, other | {"corpus": folder + "/other"})
    assert second[0] + third[0] == straight[0] != first[0]
    assert sum("begins at its first token; 120 tokens were read till then" in said for said in second[2]) == 1
    assert not any("begins at" in said for said in third[2])
    assert any("which goes on" in said for said in third[2])
    # and back: those who want the first data again have to say so
    [back] = gloo(1, train, folder, 8, same)
    assert "put that corpus back" in back[2][0]


def test_other_data_is_refused_before_process_groups(folder: str) -> None:
    """From the newest manifest, or from that of a path; `data.restart` and `never` leave it to others."""
    corpora = [Corpus.open(f"{folder}/corpus")]

    def make(**changes: Any) -> Any:
        return parity.settings(**{"data__corpora": [{"path": f"{folder}/corpus"}], "train__folder": folder} | changes)

    for serial, (step, seed) in enumerate([(9, 1), (4, 0)]):
        kept = {KEY: {"spans": [], "identity": identity(make(data__seed=seed), corpora)}}
        path = Path(folder) / f"checkpoints/step-{step:08d}"
        path.mkdir(parents=True)
        Manifest(Cursor(step, 1, dump(make()), kept), serial, 1, {}, {}, {}).write(path)
    (Path(folder) / "checkpoints/step-00000011").mkdir()  # interrupted
    refuse_other_data(make(), corpora)
    with pytest.raises(ConfigError, match="data.seed: 1, and 0 in step-00000004, .*; 0, or data.restart: true"):
        refuse_other_data(make(data__seed=1), corpora)
    oldest = {"checkpoint": {"resume": f"{folder}/checkpoints/step-00000009"}}
    refuse_other_data(make(data__seed=1).model_validate(make(data__seed=1).model_dump() | oldest), corpora)
    with pytest.raises(ConfigError, match="data.seed: 0, and 1 in step-00000009"):
        refuse_other_data(make().model_validate(make().model_dump() | oldest), corpora)
    refuse_other_data(make(data__seed=1, data__restart=True), corpora)


@pytest.mark.parametrize("change", [{}, {"data__restart": True}])
def test_what_the_data_is_is_known_before_it_is_read(folder: str, change: dict[str, Any]) -> None:
    """Of a fresh run too: files that are moved or replaced later are not looked at by a save."""
    where = Path(folder) / "corpus"
    config = parity.settings(data__corpora=[{"path": str(where)}], train__folder=Path(folder) / "run", **change)
    unsaved = config.model_copy(update={"checkpoint": Checkpoint(save=False)})
    known = identity(config, [Corpus.open(where)])
    refuse_other_data(unsaved, [closed := Corpus.open(where)])
    refuse_other_data(config, [corpus := Corpus.open(where)])
    where.with_suffix(".bin").rename(where.with_suffix(".away"))
    assert identity(config, [corpus]) == known
    for act in (lambda: refuse_other_data(config, [closed]), lambda: identity(unsaved, [closed])):
        with pytest.raises(CorpusError, match="corpus.bin cannot be read: No such file or directory; put it back"):
            act()
    refuse_other_data(unsaved, [closed])  # nothing is resumed and nothing saved
    where.with_suffix(".bin").write_bytes(b"other")
    assert identity(config, [corpus]) == known


def test_data_that_cannot_be_looked_at_is_told_on_all_ranks(folder: str) -> None:
    where = Path(folder) / "corpus"
    config = parity.settings(data__corpora=[{"path": str(where)}])
    data: Any = SimpleNamespace(settings=config)
    begun: Any = SimpleNamespace(cursor=Cursor(3, 9, dump(config)), where="step-00000003")

    def failed(action: Any) -> Any:
        raise RankFailure({0: (2, "corpus.bin cannot be read")})

    with (
        mock.patch("lsys.checkpoint.agreement.agree_on_first", failed),
        pytest.raises(CheckpointError, match="^step-00000003 is not gone on from: corpus.bin cannot be read$"),
    ):
        resumed(data, begun)


def test_a_checkpoint_of_before_is_one_span_of_its_configuration() -> None:
    position = stored(
        Cursor(3, 3 * 388, dump(parity.settings(data__shuffle_window=9, data__seed=4)), {"skipped_steps": 1})
    )
    assert position.sizes(3) == (388, 97, 9) and position.seed == 4
    assert position.tokens_seen(5) == 5 * 388 and position.before == 0 and position.spans[0].token == 0


def test_the_baselines_checkpoint_goes_on_with_the_same_tokens() -> None:
    cursor = Manifest.read(Path(__file__).parents[1] / "baseline/run/checkpoints/step-00000004").cursor
    position = stored(cursor).changed(4, 192, 96, 0)
    assert position == stored(cursor) and position.tokens_seen(8) == 8 * 192
    places = [position.micro_batch(step, index) for step in range(4, 8) for index in range(2)]
    assert places == [[(start, 96)] for start in range(4 * 192, 8 * 192, 96)]
