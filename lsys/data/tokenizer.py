"""Text to token ids and back: bytes, or any Hugging Face tokenizer.json."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class TokenizerError(ValueError):
    """A tokenizer cannot be used."""


class Tokenizer(Protocol):
    """What corpora need of a tokenizer."""

    spec: str
    vocab: int
    eod: int
    fingerprint: str

    def encode(self, text: str) -> NDArray[Any]:
        """Token ids [n]. No special tokens are added."""
        ...

    def encode_with_starts(self, text: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Token ids [n], and for each the character of `text` at which it begins [n]."""
        ...

    def decode(self, ids: NDArray[np.int64]) -> str:
        """The text; special tokens are left out, and what is not UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """One token per byte of UTF-8; id 256 ends a document."""

    spec, vocab, eod, fingerprint = "bytes", 257, 256, "bytes"

    def encode(self, text: str) -> NDArray[Any]:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def encode_with_starts(self, text: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        ids = self.encode(text)
        starts = ids & 0xC0 != 0x80  # bytes that begin a character
        return ids, starts.cumsum() - 1

    def decode(self, ids: NDArray[np.int64]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json of the Hugging Face tokenizers library.

    Args:
        path: the file. eod: the token that ends documents; found by its usual names if empty.

    Raises:
        TokenizerError: no such file, not a tokenizer, or no end-of-document token.
    """

    def __init__(self, path: str, eod: str | None = None) -> None:
        from tokenizers import Tokenizer as Library

        if not Path(path).is_file():
            inside = Path(path) / "tokenizer.json"
            if inside.is_file():
                raise TokenizerError(f"tokenizer {path} is a folder; give --tokenizer {inside}")
            what = "has no tokenizer.json" if Path(path).is_dir() else "not found, and nothing is downloaded"
            raise TokenizerError(f"tokenizer {path} {what}; give the path of a tokenizer.json, or bytes")
        try:
            self.library = Library.from_file(path)
        except Exception as error:  # the library raises a bare Exception
            raise TokenizerError(f"{path} is no tokenizer.json: {error}; give the path of one, or bytes") from None
        self.library.no_truncation()
        self.library.no_padding()
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        names = [eod] if eod else [name for name in END_OF_DOCUMENT if name in vocabulary]
        if not names or names[0] not in vocabulary:
            special = sorted(str(t.content) for t in self.library.get_added_tokens_decoder().values())
            wanted = f"{eod!r}" if eod else f"none of {', '.join(END_OF_DOCUMENT)}"
            found = f"it has {wanted}" if not eod else f"it has no {wanted}"
            raise TokenizerError(
                f"{path} needs a token that ends documents and {found}; name one with --eod, its special tokens are {special}"
            )
        self.spec, self.eod = path, vocabulary[names[0]]
        self.vocab = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def encode(self, text: str) -> NDArray[Any]:
        return np.array(self.library.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_with_starts(self, text: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        encoding = self.library.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int64), starts

    def decode(self, ids: NDArray[np.int64]) -> str:
        return str(self.library.decode([int(i) for i in ids], skip_special_tokens=True))


def load_tokenizer(spec: str, eod: str | None = None) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json."""
    return ByteTokenizer() if spec == "bytes" else HuggingFaceTokenizer(spec, eod)
