"""Decoding token by token, from states and caches, is what the model computes of the whole document at once."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import resuming

PATTERNS = (("LS", "F"), ("RGW", "F-"), ("MDNS", "-"), ("KS", "F"))
TOLERANCE = 2e-4  # fp32; of the largest logit


def train_two_steps(rank: int, world_size: int, changes: dict[str, Any], folder: Path) -> None:
    """Saves a checkpoint into the folder."""
    from lsys.checkpoint import Checkpoints

    with resuming.engine_of(rank, world_size, changes) as engine:
        resuming.advance(engine, 0, 2, resuming.Seen())
        with engine.settled_parameters():
            Checkpoints(folder, keep=1).save(engine, resuming.cursor_of(engine, 2))


def decode(
    rank: int, world_size: int, folder: Path, document: torch.Tensor, parts: list[int], trust: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """Logits of the document read in parts; bytes kept after each part; what the model says of the whole as it trains."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.checkpoint.choice import find_checkpoint
    from lsys.checkpoint.manifest import Manifest
    from lsys.generate import Decoder, configuration, one_device
    from lsys.model.loss import token_losses
    from lsys.model.packed import PackedMicroBatch
    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    path = find_checkpoint(folder).path
    manifest = Manifest.read(path)
    settings = one_device(configuration(manifest, trust))
    with process_groups(settings.parallel, Launch()) as groups:
        decoder = Decoder.load(settings, groups, path, manifest)
        logits, kept = [], []
        for part in document.split(parts):
            logits.append(decoder.read(part))
            kept.append(decoder.cache.bytes)
        packed = PackedMicroBatch(
            layout=SequenceLayout.contiguous([len(document)], 1), positions=torch.arange(len(document))
        )
        targets = document.roll(-1)
        with torch.no_grad():
            logits_of_all = decoder.model.logits(document, packed)
            losses = token_losses(logits_of_all[..., :61].contiguous(), targets[:, None], 0.0, groups.collection.tp)[0]
        return torch.cat(logits), kept, losses


@pytest.mark.parametrize(("pattern", "channels"), PATTERNS)
def test_token_by_token_is_the_parallel_form(gloo: Any, tmp_path: Path, pattern: str, channels: str) -> None:
    changes = {"model__pattern": pattern, "model__layers": 2 * len(pattern), "model__window": 5, "parallel__tensor": 2}
    changes["model__channels"] = channels
    gloo(2, train_two_steps, changes, tmp_path)
    document = torch.randint(0, 61, (70,), generator=torch.Generator().manual_seed(0))
    whole, _, losses = gloo(1, decode, tmp_path, document, [70])[0]
    # By the training path, which knows no cache.
    targets = document.roll(-1)
    assert whole.shape == (70, 61)  # of the padded vocabulary, 64, the tokens
    entropy = torch.nn.functional.cross_entropy(whole.double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), entropy, atol=TOLERANCE, rtol=TOLERANCE)
    for parts in ([1] * 70, [30, *[1] * 40], [3, 66, 1]):
        found, kept, _ = gloo(1, decode, tmp_path, document, parts)[0]
        assert (found - whole).abs().max() <= TOLERANCE * whole.abs().max(), parts
        if "S" not in pattern:  # after the window's length nothing grows
            assert len(set(kept[10:])) <= 1


def test_the_command_goes_on_from_a_prompt(gloo: Any, tmp_path: Path) -> None:
    gloo(1, train_two_steps, {"model__vocab": 257, "model__pattern": "LS"}, tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "def ", "--tokens", "7", "--tokenizer", "bytes"]
    found = [subprocess.run([sys.executable, "-m", "lsys", *words], capture_output=True) for _ in range(2)]
    for each in found:
        assert each.returncode == 0, each.stderr.decode()
        assert each.stdout.startswith(b"def ") and b"tokens, " in each.stderr
    assert found[0].stdout == found[1].stdout


def test_the_state_matters(gloo: Any, tmp_path: Path) -> None:
    """A decoder that forgot would say of the second half what it says of a document of its own."""
    gloo(1, train_two_steps, {"model__pattern": "L"}, tmp_path)
    document = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(0))
    whole = gloo(1, decode, tmp_path, document, [40])[0][0]
    half = gloo(1, decode, tmp_path, document[20:], [20])[0][0]
    assert (whole[20:] - half).abs().max() > 1e-3 * whole.abs().max()


def test_draws_follow_the_options() -> None:
    from lsys.generate import draw

    logits = torch.tensor([1.0, 3.0, 2.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    assert draw(logits, 0.0, 1.0, generator) == 1
    drawn = [draw(logits, 1.0, 1.0, generator) for _ in range(3000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 3000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.03, rtol=0)
    assert {draw(logits, 1.0, 0.7, generator) for _ in range(200)} == {1, 2}  # 0.67, then 0.91
    assert {draw(logits, 1.0, 0.5, generator) for _ in range(200)} == {1}


def test_a_corpus_that_is_not_here_wants_the_tokenizer_named() -> None:
    from support import parity

    from lsys.generate import GenerateError, run_tokenizer

    settings = parity.settings()
    with pytest.raises(GenerateError, match=r"unused\.idx not found, which says what .*; name it with --tokenizer$"):
        run_tokenizer(settings, None)
    assert run_tokenizer(settings, "bytes").vocab == 257


def test_a_corpus_that_names_no_tokenizer_wants_it_named(tmp_path: Path) -> None:
    from support import corpora, parity

    from lsys.generate import GenerateError, run_tokenizer

    prefix = corpora.write_corpus(tmp_path / "c", [[1, 2]])
    with pytest.raises(
        GenerateError, match=r"c\.json does not say which tokenizer made the corpus; name it with --tokenizer$"
    ):
        run_tokenizer(parity.settings(data__corpora=[{"path": str(prefix)}]), None)


def test_wrong_options_are_refused_together(tmp_path: Path) -> None:
    from lsys.checkpoint import CheckpointError
    from lsys.checkpoint.choice import find_checkpoint
    from lsys.generate import GenerateError, GenerateOptions, check

    with pytest.raises(GenerateError) as caught:
        check(GenerateOptions(tmp_path, "", tokens=0, temperature=-1.0, top_p=0.0))
    for part in ("--prompt is empty", "--tokens is 0", "--temperature is -1.0", "--top-p is 0.0"):
        assert part in str(caught.value)
    check(GenerateOptions(tmp_path, "a", tokens=1, temperature=0.0, top_p=1.0))  # the least and the most that will do
    with pytest.raises(CheckpointError, match="is no checkpoint, and no run's folder with a whole one"):
        find_checkpoint(tmp_path)
