"""`lsys generate`: a document goes on from a prompt, one token at a time, with the weights of a checkpoint.

State layers (linear attention) keep a state of constant size, softmax layers the keys and values of what came before.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tyro.conf import Positional, UseAppendAction

from lsys.checkpoint.choice import find_checkpoint
from lsys.checkpoint.manifest import Manifest
from lsys.config import Config
from lsys.config.load import loads
from lsys.config.messages import ConfigError
from lsys.config.mixers import CARD
from lsys.config.schema import Parallel, Train
from lsys.config.user_code import UserCode
from lsys.data.corpus import Corpus, CorpusError
from lsys.data.tokenizer import Tokenizer, load_tokenizer
from lsys.runtime import install_megatron
from lsys.runtime.environment import launch_from_environment
from lsys.runtime.groups import Groups, process_groups

if TYPE_CHECKING:  # at run time it would import Megatron, which wants to be prepared first
    from lsys.model.hybrid import HybridModel


@dataclass(frozen=True)
class GenerateOptions:
    """Go on from a prompt, one token at a time."""

    checkpoint: Positional[Path]
    """Folder of a run, whose newest checkpoint is taken, or of one checkpoint."""
    prompt: str
    """What the document begins with."""
    tokens: int = 256
    """At most so many tokens; the document may end before."""
    temperature: float = 0.0
    """0 takes the most probable token; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together have this probability (nucleus sampling)."""
    seed: int = 0
    """Of the draws."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer.json; that of the run's corpus if empty."""
    trust: UseAppendAction[tuple[str, ...]] = ()
    """A path such as my_package.cards:Mine that the checkpoint's configuration names, once for each: only what is repeated here is imported."""


class GenerateError(ValueError):
    """What was asked for cannot be generated."""


def main(options: GenerateOptions) -> int:
    """Print the prompt and what follows it, as it is made; the exit code."""
    check(options)
    install_megatron()
    from lsys.model.own import require_modules

    path = find_checkpoint(options.checkpoint).path
    manifest = Manifest.read(path)
    settings = one_device(configuration(manifest, options.trust))
    require_modules(settings)
    tokenizer = run_tokenizer(settings, options.tokenizer)
    prompt = torch.from_numpy(tokenizer.encode(options.prompt).astype("int64"))
    if len(prompt) and prompt.max() >= settings.model.vocab:
        raise GenerateError(
            f"token {prompt.max()} of the prompt is not below model.vocab {settings.model.vocab}: another tokenizer"
        )
    with process_groups(settings.parallel, launch_from_environment()) as groups:
        decoder = Decoder.load(settings, groups, path, manifest)
        generator = torch.Generator(groups.device).manual_seed(options.seed)
        ids: list[int] = []
        print(options.prompt, end="", flush=True)
        shown = ""
        for token in decoder.generate(prompt, options.tokens, options.temperature, options.top_p, generator):
            if token == tokenizer.eod:
                break
            ids.append(token)
            text = tokenizer.decode(torch.tensor(ids).numpy())
            whole = text.rstrip("\ufffd")  # a character whose bytes have not all come
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
        print()
    print(f"{len(ids)} tokens, {decoder.cache.bytes / 1e6:.3g} MB of states, keys and values", file=sys.stderr)
    return 0


def check(options: GenerateOptions) -> None:
    """Refuse wrong options, all at once."""
    wrong = []
    if not options.prompt:
        wrong.append("--prompt is empty; a document needs a token to go on from")
    if options.tokens < 1:
        wrong.append(f"--tokens is {options.tokens}; it is 1 or more")
    if not options.temperature >= 0:
        wrong.append(f"--temperature is {options.temperature}; it is 0 or more")
    if not 0 < options.top_p <= 1:
        wrong.append(f"--top-p is {options.top_p}; it is above 0 and at most 1")
    if launch_from_environment().world_size > 1:
        wrong.append("generation runs in one process; start it without torchrun")
    if wrong:
        raise GenerateError("\n".join(wrong))


def configuration(manifest: Manifest, trusted: Sequence[str] = ()) -> Config:
    """The configuration of a checkpoint. Of what it names, cards that are among `trusted` are imported; the rest takes no part.

    Raises:
        GenerateError: it names code that is not among `trusted`, which has not run.
    """
    code = UserCode(trusted, needed=(CARD,))
    try:
        return loads(manifest.cursor.config, code)
    except ConfigError:
        if not code.refused:
            raise
        options = " ".join(f"--trust {path}" for path in code.refused)
        raise GenerateError(
            f"the checkpoint's configuration names code that would run, {', '.join(code.refused)}; if you trust it, repeat it: {options}"
        ) from None


def one_device(settings: Config) -> Config:
    """The run's model on one device: what was trained at any degrees, by any loss."""
    train = settings.train.model_copy(update={"loss": Train.model_fields["loss"].default})
    return settings.model_copy(update={"parallel": Parallel(linear=settings.parallel.linear), "train": train})


def run_tokenizer(settings: Config, spec: str | None) -> Tokenizer:
    """The tokenizer named, or that of the run's first corpus.

    Raises:
        GenerateError: that corpus is not here, or does not say. TokenizerError: the one that is named cannot be used.
    """
    if spec:
        return load_tokenizer(spec)
    path = settings.data.corpora[0].path
    try:
        tokenizer = Corpus.open(path).tokenizer
    except CorpusError as error:
        raise GenerateError(
            f"{error.problem}, which says what tokenizer the run had; name it with --tokenizer"
        ) from None
    if tokenizer is None:
        raise GenerateError(f"{path}.json does not say which tokenizer made the corpus; name it with --tokenizer")
    return tokenizer


class Decoder:
    """A model that reads a document token by token, and what it keeps of what it has read."""

    def __init__(self, model: "HybridModel", device: torch.device) -> None:
        from lsys.model.cache import Cache

        self.model, self.device, self.cache, self.position = model, device, Cache(), 0

    @classmethod
    def load(cls, settings: Config, groups: Groups, path: Path, manifest: Manifest) -> "Decoder":
        """With the weights of a checkpoint, in the precision of the run."""
        from lsys.checkpoint.weights import load_weights
        from lsys.model.hybrid import HybridModel
        from lsys.model.megatron_config import transformer_config

        config, whole = transformer_config(settings), dict(pre_process=True, post_process=True)
        model = HybridModel(settings, config, groups.collection, groups.context, **whole)
        load_weights(model, groups, path, manifest)
        return cls(model.eval(), groups.device)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """The next tokens of the document, int64 [n], n > 0 -> logits fp32 [n, vocab] of what follows each."""
        from lsys.model.packed import PackedMicroBatch
        from lsys.parallel.layout import SequenceLayout

        n = len(tokens)
        positions = torch.arange(self.position, self.position + n, device=self.device)
        packed = PackedMicroBatch(layout=SequenceLayout.contiguous([n], 1), positions=positions, cache=self.cache)
        self.position += n
        return self.model.logits(tokens.to(self.device), packed)[:, 0, : self.model.vocab].float()

    def generate(
        self, prompt: Tensor, tokens: int, temperature: float, top_p: float, generator: torch.Generator
    ) -> Iterator[int]:
        """At most so many tokens after the prompt, each drawn given all before."""
        logits = self.read(prompt)[-1]
        for number in range(tokens):
            token = draw(logits, temperature, top_p, generator)
            yield token
            if number + 1 < tokens:
                logits = self.read(torch.tensor([token]))[-1]


def draw(logits: Tensor, temperature: float, top_p: float, generator: Any) -> int:
    """A token id from logits [vocab] (nucleus sampling: Holtzman et al., 2020)."""
    if temperature == 0:
        return int(logits.argmax())
    probability, order = (logits / temperature).softmax(-1).sort(descending=True)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0)
    return int(order[torch.multinomial(probability, 1, generator=generator)])
