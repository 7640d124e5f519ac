"""What the files of a prepared corpus say of themselves: headers, sizes and description, seen without reading the files whole.

The format is Megatron-core's (megatron/core/datasets/indexed_dataset.py): PREFIX.idx begins with a magic, a version, a code of the numbers' type and two
counts; the length [sequences] and the first byte [sequences] of each sequence follow, then the first sequence of each document and their end.
"""

import json
import shlex
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lsys.config.messages import Mistake
from lsys.config.schema import Config

MAGIC = b"MMIDIDX\x00\x00"
HEAD = len(MAGIC) + struct.calcsize("<QBQQ")
# Name and bytes of a number, by code.
TYPES = {
    1: ("uint8", 1),
    2: ("int8", 1),
    3: ("int16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
    6: ("float64", 8),
    7: ("float32", 4),
    8: ("uint16", 2),
}
SIDECAR_VERSION = 1
MARGIN = 256  # entries of a vocabulary that nobody minds


class CorpusError(ValueError):
    """A corpus is missing, damaged, or does not fit the model. `problem` and `fix` are the halves of its text.

    All ranks of a node find the same (`on_node`).
    """

    on_node = True

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}; {fix}" if fix else problem)


class Header(NamedTuple):
    """What the beginning of PREFIX.idx says: the type of token ids, and how many sequences and documents there are."""

    dtype: str
    itemsize: int
    sequences: int
    documents: int


@dataclass(frozen=True)
class CorpusFiles:
    """A corpus by its files' own words.

    Attributes:
        header: of its index. tokens: in its .bin. description: of PREFIX.json; empty where there is none, as beside files of Megatron's own tools.
    """

    header: Header
    tokens: int
    description: dict[str, Any]


def corpus_files(prefix: str) -> CorpusFiles:
    """The files' own words, which agree with each other and with the files' sizes.

    Raises:
        CorpusError: a file is missing, truncated, or of another corpus.
    """
    if missing := missing_files(prefix):
        path = Path(prefix)
        # PREFIX.bin.bin is missing where PREFIX.bin was meant
        ended = path.suffix in (".bin", ".idx") and f"leave out {path.suffix}: the path is a prefix"
        makes = "makes it" if len(missing) == 1 else "makes them"
        raise CorpusError(
            f"{' and '.join(missing)} not found", ended or f"lsys data prepare ... --out {prefix} {makes}"
        )
    description = read_description(prefix)
    again = prepare_again(prefix, description)
    header, tokens = _header(Path(f"{prefix}.idx"), again), 0
    if not header.dtype.startswith(("int", "uint")):
        raise CorpusError(f"{prefix}.idx holds {header.dtype} numbers: token ids are integers", again)
    if header.sequences:
        tokens = _end(Path(f"{prefix}.idx"), header) // header.itemsize
    size, wanted = Path(f"{prefix}.bin").stat().st_size, tokens * header.itemsize
    if size != wanted:
        problem = f"{prefix}.bin has {size} bytes, its index says {wanted}: it is truncated or of another index"
        raise CorpusError(problem, again)
    if not tokens:
        raise CorpusError(f"{prefix} holds no tokens", f"{again} from text that is not empty")
    if description and (said := (description["documents"], description["tokens"])) != (header.documents, tokens):
        problem = (
            f"{prefix}.json says {said[0]} documents and {said[1]} tokens, {prefix}.idx {header.documents} and {tokens}"
        )
        raise CorpusError(f"{problem}: they are of two corpora", again)
    return CorpusFiles(header, tokens, description)


def missing_files(prefix: str) -> list[str]:
    """Paths of a corpus's .bin and .idx that are not there."""
    return [f"{prefix}{ending}" for ending in (".bin", ".idx") if not Path(f"{prefix}{ending}").is_file()]


def read_description(prefix: str) -> dict[str, Any]:
    """PREFIX.json, which `lsys data prepare` writes; empty where there is none.

    Raises:
        CorpusError: it is something else.
    """
    path = Path(f"{prefix}.json")
    if not path.exists():
        return {}
    try:
        description = json.loads(path.read_text())
        numbers = [description[key] for key in ("version", "documents", "tokens")] + [description.get("vocab", 0)]
        if not all(type(number) is int for number in numbers):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        problem = f"{path} is not what lsys data prepare writes"
        raise CorpusError(problem, "prepare the corpus again, or remove that file") from None
    version = numbers[0]
    if version != SIDECAR_VERSION:
        problem = f"{path} has format version {version}, this lsys reads {SIDECAR_VERSION}"
        raise CorpusError(problem, "prepare the corpus again")
    return description


def prepare_again(prefix: str, description: dict[str, Any]) -> str:
    """How the corpus is made anew; as a command, where its description says of what."""
    try:
        sources, options = [*description["sources"]], [*description.get("options", [])]
        spec = description["tokenizer"]["spec"]
        named = ["--tokenizer", spec] if spec != "bytes" else []
        command = shlex.join(["lsys", "data", "prepare", *sources, "--out", prefix, "--overwrite", *named, *options])
    except (KeyError, TypeError):  # files of other tools have no description
        return "prepare it again"
    return f"prepare it again: {command}"


def _header(index: Path, again: str) -> Header:
    size = index.stat().st_size
    with index.open("rb") as file:
        raw = file.read(HEAD)
    if raw[: len(MAGIC)] != MAGIC:
        raise CorpusError(f"{index} is no Megatron index: it does not begin with MMIDIDX", again)
    if len(raw) < HEAD:
        raise CorpusError(f"{index} is truncated: {len(raw)} bytes, its header alone has {HEAD}", again)
    version, code, sequences, borders = struct.unpack_from("<QBQQ", raw, len(MAGIC))
    if version != 1 or code not in TYPES:
        problem = f"{index} has version {version} and dtype code {code}"
        raise CorpusError(problem, f"version 1 and codes 1 to 8 are known; {again}")
    expected = HEAD + sequences * 12 + borders * 8
    if size != expected:
        problem = f"{index} has {size} bytes, its header says {expected}: it is truncated or damaged"
        raise CorpusError(problem, again)
    if borders < 1:
        raise CorpusError(f"{index}: its documents do not cover its {sequences} sequences in order", again)
    return Header(*TYPES[code], sequences, borders - 1)


def _end(index: Path, header: Header) -> int:
    """Bytes of the .bin: where the last sequence begins, and its length."""
    with index.open("rb") as file:
        file.seek(HEAD + 4 * (header.sequences - 1))
        (length,) = struct.unpack("<i", file.read(4))
        file.seek(HEAD + 12 * header.sequences - 8)
        (start,) = struct.unpack("<q", file.read(8))
    return start + length * header.itemsize


def corpus_mistakes(key: str, prefix: Path, vocab: int, *, holds_out: bool = False) -> Iterator[Mistake]:
    """What is wrong with the files of a corpus, or between them and the model.

    Args:
        key: of the configuration, that names it. holds_out: whether documents of it are kept for validation.
    """
    try:
        files = corpus_files(str(prefix))
        if Path(f"{prefix}.mask.idx").exists():
            mask = corpus_files(f"{prefix}.mask")
            if (mask.header.documents, mask.tokens) != (files.header.documents, files.tokens):
                again = prepare_again(str(prefix), files.description)
                raise CorpusError(f"{prefix}.mask has other document lengths than {prefix}", again)
    except CorpusError as error:
        yield Mistake(key, error.problem, error.fix, is_local=True, is_file=True)
        return
    except OSError as error:
        problem = f"{error.filename or prefix} cannot be read: {error.strerror or error}"
        yield Mistake(key, problem, "let this user read it", is_local=True, is_file=True)
        return
    needed = files.description.get("vocab", 0)  # files that other tools made say nothing
    if needed > vocab:
        problem = f"{vocab} is below the {needed} tokens of corpus {prefix}"
        yield Mistake("model.vocab", problem, f"{needed} or more", is_local=True, is_file=True)
    if holds_out and files.header.documents < 2:
        problem = f"corpus {prefix} has 1 document, which cannot be held out and trained on"
        fix = "data.validation_fraction 0 trains on it all, without validation; or add documents"
        yield Mistake("data.validation_fraction", problem, fix, is_local=True, is_file=True)


def tokenizer_mistakes(prefixes: Sequence[Path]) -> Iterator[Mistake]:
    """Corpora that other tokenizers made than the first one that says so, or that end documents otherwise: a model reads one vocabulary."""
    first: tuple[Path, dict[str, Any]] | None = None
    for number, prefix in enumerate(prefixes):
        try:
            found = read_description(str(prefix))
        except (CorpusError, OSError):  # told of that corpus alone
            continue
        made, ended = found.get("tokenizer") or {}, found.get("eod")
        if not made.get("fingerprint"):
            continue
        if first is None:
            first = prefix, found
            continue
        other, eod = first[1]["tokenizer"], first[1].get("eod")
        by = f"was made by tokenizer {made.get('spec')}", f"by {other.get('spec')}"
        ends = f"ends documents with token {ended}", f"with {eod}"
        if made["fingerprint"] != other["fingerprint"]:
            what, theirs = by
            if made.get("spec") == other.get("spec"):
                what, theirs = (
                    f"{what} ({made['fingerprint'][:8]})",
                    f"{theirs} as it was then ({other['fingerprint'][:8]})",
                )
        elif ended != eod:
            what, theirs = ends
        else:
            continue
        problem = f"corpus {prefix} {what}, corpus {first[0]} {theirs}: a token would mean two things"
        options = [
            *found.get("options", []),
            *(["--eod", other["eod_name"]] if other.get("eod_name") else []),
        ]  # the last counts
        again = prepare_again(str(prefix), found | {"tokenizer": other, "options": options})
        fix = f"{again}; or leave one of them out"
        yield Mistake(f"data.corpora.{number}.path", problem, fix, is_local=True, is_file=True)


def corpus_notices(config: Config) -> list[str]:
    """Sentences about the corpora: a vocabulary far above what their tokenizers have, where all of them say it."""
    model = config.model
    try:
        needed = [read_description(str(corpus.path)).get("vocab", 0) for corpus in config.data.corpora]
    except CorpusError:  # a mistake
        return []
    most = max(needed)
    if not min(needed) or model.vocab <= most + max(MARGIN, most // 4):
        return []
    cost = f"logits and the two vocabulary matrices are {model.vocab / most:.0f} times as large"
    return [
        f"model.vocab {model.vocab} is above the {most} tokens that the corpora's tokenizer has: {cost}; {most} does"
    ]
