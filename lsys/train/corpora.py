"""The corpora of a run, opened and checked before its process groups start."""

from lsys.config import Config
from lsys.data.corpus import Corpus

# Corpora of more bytes are not hashed when a run starts: SHA-256 takes 5 s for so many, where reading them takes 1.
HASHED = 8 << 30


def open_corpora(settings: Config, is_first: bool) -> list[Corpus]:
    """The corpora of a run, open and checked.

    Args:
        is_first: whether this is the first rank, which reads them whole, where `data.verify` is true: all token ids, and of files with a hash
            and no more than HASHED bytes, the hash. The others wait for it where ranks meet, `train.timeout_minutes` at most.

    Raises:
        CorpusError: a corpus is missing or damaged, or has token ids outside the vocabulary.
    """
    corpora = [Corpus.open(str(corpus.path)) for corpus in settings.data.corpora]
    for corpus in corpora if settings.data.verify and is_first else ():
        # Hashes first: an id that is out of range by a damage is not healed by a larger vocabulary.
        if corpus.tokens.nbytes <= HASHED:
            corpus.verify_hashes()
        corpus.verify_tokens(settings.model.vocab)
    return corpora
