"""`lsys data inspect`: what a corpus holds."""

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from lsys.data.corpus import Corpus, CorpusError
from lsys.data.entropy import BigramCounter


@dataclass
class InspectArgs:
    """Counts, a histogram of document lengths, and a document as text."""

    prefix: Positional[str]
    """The corpus: path without .bin or .idx."""
    document: int | None = None
    """Print this document."""
    tokens: int = 500
    """How many of its tokens."""
    verify: bool = False
    """Compare the files with the SHA-256 of when they were prepared."""
    entropy: bool = False
    """Count the entropy of tokens and of pairs of them; reads the whole corpus."""


def inspect(arguments: InspectArgs) -> None:
    """Print the corpus's counts and histogram, or one of its documents."""
    corpus, console = Corpus.open(arguments.prefix), Console(highlight=False, soft_wrap=True)
    if arguments.verify:
        corpus.verify_hashes()
    if arguments.document is not None:
        console.print(document_text(corpus, arguments.document, arguments.tokens), markup=False)
        return
    known = corpus.description
    console.print(
        f"{corpus.prefix}: {corpus.documents:,} documents, {corpus.lengths.sum():,} tokens ({corpus.tokens.dtype})"
    )
    if known:
        console.print(
            f"tokenizer {known['tokenizer']['spec']}, vocabulary {known['vocab']}, end of document {known['eod']}"
        )
        console.print(f"sources: {', '.join(known['sources'])}")
    if corpus.mask is not None:
        counted = np.asarray(corpus.mask.tokens).mean()
        console.print(f"loss mask: {100 * counted:.1f}% of the tokens count")
    if arguments.entropy:
        unigram, bigram = entropies(corpus)
        console.print(f"unigram entropy: {unigram:.4f}, bigram entropy: {bigram:.4f} nats per token")
    elif corpus.bigram_entropy is not None:
        console.print(f"bigram entropy: {corpus.bigram_entropy:.4f} nats per token")
    console.print(histogram(corpus))


def entropies(corpus: Corpus) -> tuple[float, float]:
    """Entropy of a token, and of a token given the one before, nats."""
    counter = BigramCounter(int(corpus.tokens.max()) + 1)
    for document, length in enumerate(corpus.lengths.tolist()):
        counter.add(corpus.read(document, 0, length))
    return counter.unigram_entropy(), counter.entropy()


def histogram(corpus: Corpus) -> Table:
    """Documents by length, in powers of two."""
    table = Table("tokens", "documents", "% of documents", "% of tokens", "")
    for column in table.columns[:4]:
        column.justify = "right"
    bins = np.where(corpus.lengths > 0, np.floor(np.log2(np.maximum(corpus.lengths, 1))), -1).astype(int)
    total = max(1, int(corpus.lengths.sum()))
    for power in range(bins.min(), bins.max() + 1):
        inside = corpus.lengths[bins == power]
        name = "0" if power < 0 else f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        share, tokens = len(inside) / corpus.documents, inside.sum() / total
        table.add_row(name, f"{len(inside):,}", f"{100 * share:.1f}", f"{100 * tokens:.1f}", "#" * round(40 * tokens))
    return table


def document_text(corpus: Corpus, document: int, tokens: int) -> str:
    """The first tokens of a document, decoded.

    Raises:
        CorpusError: no such document, or the corpus does not say which tokenizer made it.
    """
    if not 0 <= document < corpus.documents:
        raise CorpusError(f"{corpus.prefix} has no document {document}; there are 0 to {corpus.documents - 1}")
    ids = corpus.read(document, 0, min(tokens, int(corpus.lengths[document])))
    if corpus.tokenizer is None:
        raise CorpusError(
            f"{corpus.prefix}.json is missing, so its tokenizer is unknown; document {document} is {ids.tolist()}"
        )
    return str(corpus.tokenizer.decode(ids))
