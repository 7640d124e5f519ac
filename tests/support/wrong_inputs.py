"""Inputs that users get wrong: the command, what it must say, and how its remedy is taken from what it said.

Each command runs in a folder with `run.yaml`, three texts in `texts`, and `data/mine`, the corpus of these. Rows are numbered as they were first tried.
"""

import gzip
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from lsys.cli import main
from support.texts import dataset, dataset_dict, lines, write

CONFIG = """\
model: {pattern: LS, layers: 2, hidden: 32, heads: 4, groups: 2, head_dim: 8, vocab: 257}
data: {corpora: [{path: data/mine}], validation_fraction: 0.3}
optimizer: {lr: 0.01, warmup_steps: 1}
train: {folder: run, steps: 40, batch_tokens: 2048, micro_batch_tokens: 1024, precision: fp32, validate_tokens: 64}
metrics: {waterfall_every: 0}
"""
CHECK, TRAIN, PREPARE = (
    "check run.yaml --world-size {ranks}",
    "train run.yaml",
    "data prepare texts --workers 1 --out {out}",
)
Remedy = Callable[[str, str], str]  # (what was said, the command) -> the command that works


def check(words: str = "", ranks: int = 2) -> str:
    return f"check run.yaml --world-size {ranks} {words}"


def train(words: str = "") -> str:
    return f"train run.yaml {words}"


def prepare(source: str, words: str = "") -> str:
    return f"data prepare {source} --workers 1 --out data/new {words}"


def found(pattern: str, said: str) -> re.Match:
    """Where the remedy stands in what was said, which has it."""
    match = re.search(pattern, said, re.DOTALL)
    assert match, f"no remedy {pattern!r} in: {said}"
    return match


def also(pattern: str, template: str = r"\1") -> Remedy:
    """The remedy is added to the command; of a key that is given twice, the last counts."""
    return lambda said, words: f"{words} {found(pattern, said).expand(template)}"


def instead(old: str, pattern: str, template: str = r"\1") -> Remedy:
    """The remedy takes the place of a part of the command."""

    def apply(said: str, words: str) -> str:
        assert old in words
        return words.replace(old, found(pattern, said).expand(template))

    return apply


def edit(old: str, pattern: str, template: str = r"\1", file: str = "run.yaml") -> Remedy:
    """The remedy is written into a file."""

    def apply(said: str, words: str) -> str:
        text = Path(file).read_text()
        assert old in text
        Path(file).write_text(text.replace(old, found(pattern, said).expand(template), 1))
        return words

    return apply


def runs(pattern: str, fill: str = "") -> Remedy:
    """The remedy is a command; `...` in it stands for what only the user knows."""

    def apply(said: str, words: str) -> str:
        command = found(pattern, said)[1].replace("...", fill)
        if command.startswith("lsys "):
            assert main([*shlex.split(command)[1:], "--workers", "1"]) == 0
        else:
            subprocess.run(command, shell=True, check=True)
        return words

    return apply


def then(*remedies: Remedy) -> Remedy:
    def apply(said: str, words: str) -> str:
        for remedy in remedies:
            words = remedy(said, words)
        return words

    return apply


def does(pattern: str, action: Callable[[], object]) -> Remedy:
    """The remedy is an act that is described; the description is there."""

    def apply(said: str, words: str) -> str:
        found(pattern, said)
        action()
        return words

    return apply


@dataclass(frozen=True)
class Case:
    """One wrong input.

    Attributes:
        row: its number. words: the command. told: what it must say, in this order: values and rule.
        remedy: None: there is nothing to put right. before: makes what the command meets.
        code: exit code; 0 is a notice, which is gone with the remedy; None: any but 0.
        trains: whether the command trains, in a folder with the checkpoint of two steps.
        until: why it is not told yet.
    """

    row: int
    words: str
    told: tuple[str, ...]
    remedy: Remedy | None
    before: Callable[[], object] = lambda: None
    code: int | None = 2
    trains: bool = False
    until: str = ""


def yaml(old: str, new: str) -> Callable[[], object]:
    return lambda: Path("run.yaml").write_text(CONFIG.replace(old, new)) if old in CONFIG else 1 / 0


def put(path: str, content: str | bytes) -> Callable[[], object]:
    return lambda: write(Path(path), content)


def cut(path: str, size: int) -> Callable[[], object]:
    return lambda: os.truncate(path, size)


def patch(path: str, place: int, content: bytes) -> None:
    raw = bytearray(Path(path).read_bytes())
    raw[place : place + len(content)] = content
    Path(path).write_bytes(raw)


def described(**changes: object) -> Callable[[], object]:
    """The corpus's description says otherwise."""

    def change() -> None:
        path = Path("data/mine.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tokens(*, sidecar: bool) -> Callable[[], object]:
    """A token that no vocabulary of bytes has."""

    def change() -> None:
        patch("data/mine.bin", 1000, (60000).to_bytes(2, "little"))
        if not sidecar:
            Path("data/mine.json").unlink()

    return change


def tokenizer(path: str, eod: str = "<|endoftext|>") -> Callable[[], object]:
    def make() -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator([], trainers.BpeTrainer(special_tokens=[eod], initial_alphabet=alphabet))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        made.save(path)

    return make


def table(path: str, **columns: list) -> Callable[[], object]:
    return lambda: parquet.write_table(pyarrow.table(columns), path)


def other_tokenizer() -> None:
    """A corpus of the same texts by a tokenizer.json."""
    tokenizer("t.json")()
    assert main("data prepare texts --workers 1 --out data/tok --tokenizer t.json".split()) == 0


def trace() -> None:
    """A trace of one step, as train.profile writes it."""
    step = {"ph": "X", "name": "lsys.step 4", "cat": "user_annotation", "ts": 0, "dur": 10, "pid": 1, "tid": 1}
    with gzip.open("texts/rank0-step4.json.gz", "wt") as file:
        json.dump({"traceEvents": [step]}, file)


def full_disk() -> None:
    Path(f"data/.new.{os.getpid()}.partial.bin").symlink_to("/dev/full")


def jsonl(*rows: object) -> Callable[[], object]:
    return lambda: lines(Path("a.jsonl"), *rows)


OPTION = r"did you mean (--\S+ [^?]+)\?"
CASES = [
    # What a configuration says.
    Case(1, check("--parallel.tensr 2"), ("parallel.tensr: unknown key",), instead("tensr", r"did you mean (\w+)\?")),
    Case(2, check(), ("train.micro_batch_tokens: missing", "train.microbatch_tokens: unknown key"),
         edit("microbatch_tokens", r"did you mean (\w+)\?"), yaml("micro_batch_tokens", "microbatch_tokens")),
    Case(3, check(), ("model: missing", "modle: unknown key"), edit("modle", r"did you mean (\w+)\?"), yaml("model:", "modle:")),
    Case(4, check("--model.layers two"), ("model.layers: 'two'", "a whole number"), also(r"in digits, such as (\d+)", r"--model.layers \1")),
    Case(4, check("--optimizer.lr 3e-3x"), ("optimizer.lr: '3e-3x'", "a number"), also(r"did you mean (\S+)\?", r"--optimizer.lr \1")),
    Case(4, check("--train.steps 2k"), ("train.steps: '2k'", "a whole number"), also(r"write (\d+), or", r"--train.steps \1")),
    Case(4, check("--train.steps 40.5"), ("train.steps: 40.5", "a whole number"), also(r"; (\d+) or", r"--train.steps \1")),
    Case(4, check("--checkpoint.save perhaps"), ("checkpoint.save: 'perhaps'",), also(r"should be (true) or", r"--checkpoint.save \1")),
    Case(5, check("--optimizer.lr '\"3e-3\"' --train.steps 4e1 --train.batch_tokens 2_048 --model.tied yes"), (), None, code=0),
    Case(6, check("--model.pattern ls"), ("model.pattern: 'l' in 'ls' is no token mixer",), also(r"did you mean (\w+)\?", r"--model.pattern \1")),
    Case(6, check("--model.pattern LX"), ("'X' in 'LX' is no token mixer",), also(r"there are (\w) \(", r"--model.pattern L\1")),
    Case(7, check("--model.pattern LW"), ("model.window: it is empty", "pattern 'LW' has W layers"),
         also(r"(model\.window): .*give the tokens", r"--\1 64")),
    Case(8, check("--train.precision fp16"), ("train.precision: 'fp16'",), also(r"should be '(\w+)'", r"--train.precision \1")),
    Case(8, check("--train.precision fp8"), ("train.precision: 'fp8'",), also(r"or '(\w+)'", r"--train.precision \1")),
    Case(9, check("--parallel.tensor 4 --train.batch_tokens 12288", 6), ("tensor 4 does not divide 6 ranks",), also(r"; tensor (\d)", r"--parallel.tensor \1")),
    Case(9, check("--parallel.tensor 3 --train.batch_tokens 3072", 3), ("tensor 3 does not divide 4 heads",), also(r"; (\d)", r"--parallel.tensor \1")),
    Case(9, check("--parallel.pipeline 4", 4), ("pipeline 4 does not divide 2 layers",),
         then(also(r"model.layers (\d)", r"--model.layers \1"), also("", "--train.batch_tokens 4096"))),
    Case(9, check("--parallel.expert 2"), ("expert 2 for a model without experts",), also(r"; (\d) does", r"--parallel.expert \1")),
    Case(10, check("--train.batch_tokens 2000"), ("2000 tokens are not whole micro-batches of 1024",),
         also(r"; (\d+) does", r"--train.batch_tokens \1")),
    Case(10, check("--train.batch_tokens 4096", 8), ("4 micro-batches (4096 / 1024 tokens) cannot be shared by 8",),
         also(r"; (\d+) does", r"--train.batch_tokens \1")),
    Case(11, check("--optimizer.warmup_steps 400"), ("400 is not below train.steps 40",), also(r"; (\d+) or fewer", r"--optimizer.warmup_steps \1")),
    Case(11, check("--optimizer.min_lr 1"), ("1.0 is above optimizer.lr 0.01",), also(r"; (\S+) or less", r"--optimizer.min_lr \1")),
    Case(11, check("--data.validation_fraction 1.5"), ("data.validation_fraction: 1.5", "less than 1"),
         also(r"less than (1)", r"--data.validation_fraction 0.\1")),
    Case(11, check("--optimizer.warmup_steps 0.1"), ("optimizer.warmup_steps: 0.1", "whole number"), also(r"or (\d+) does", r"--optimizer.warmup_steps \1")),
    Case(12, "check none.yaml --world-size 2", ("none.yaml cannot be read: No such file",), instead("none.yaml", r"name a YAML (file)", "run.yaml")),
    Case(12, "check data --world-size 2", ("data cannot be read: Is a directory",), instead("check data", "name a YAML (file)", "check run.yaml")),
    Case(12, check(), ("run.yaml is not a mapping of sections",), does("begin with model:, data: and train:", put("run.yaml", CONFIG)), put("run.yaml", "")),
    Case(12, check(), ("run.yaml line 4, column 1 is not YAML",), edit("\t", "indent with (spaces)", " "), 
         yaml("optimizer: {lr: 0.01, warmup_steps: 1}", "optimizer:\n\tlr: 0.01")),
    Case(12, check(), ("line 6, column 1 is not YAML: the key 'train' is given twice",),
         edit("train: {steps: 3}\n", "leave one of the two (out)", ""), put("run.yaml", CONFIG + "train: {steps: 3}\n")),
    Case(13, check("parallel.tensor=2"), ("'parallel.tensor' is no option",), instead("parallel.tensor=2", OPTION)),
    Case(14, check("--lr 1e-3"), ("'--lr' is no option",), instead("--lr 1e-3", OPTION)),
    Case(14, check("--tp 2"), ("'--tp' is no option",), instead("--tp 2", OPTION)),
    Case(17, check("--data.corpora data/mine"), ("data.corpora: 'data/mine'", "a list in brackets"), instead("data/mine", r"such as (\[\{.*?\}\])", r"'\1'")),
    Case(48, check("--search"), ("--search goes by predicted times",), also(r"add (--hardware \w+)")),
    # Corpora.
    Case(15, check("--data.corpora.0.path data/other"), ("notice: on this machine: data.corpora.0.path: data/other.bin and data/other.idx not found",),
         runs(r"; (lsys data prepare .*?) makes them", "texts"), code=0),
    Case(15, train("--data.corpora.0.path data/other"), ("data.corpora.0.path: data/other.bin and data/other.idx not found",),
         runs(r"; (lsys data prepare .*?) makes them", "texts")),
    Case(16, train("--data.corpora.0.path data/mine.bin"), ("data/mine.bin.bin and data/mine.bin.idx not found", "the path is a prefix"),
         instead("mine.bin", r"leave out \.bin()", "mine")),
    Case(18, train(), ("data/mine.idx has 100 bytes, its header says 102",), runs(r"prepare it again: (lsys .*)$"), cut("data/mine.idx", 100)),
    Case(18, train(), ("data/mine.bin has 100 bytes, its index says ",), runs(r"prepare it again: (lsys .*)$"), cut("data/mine.bin", 100)),
    Case(19, train(), ("token 500 of document 0 is 60000, not below model.vocab 257",), also(r"is (\d+), .*raise model\.vocab", r"--model.vocab 6\1"),
         tokens(sidecar=False)),
    Case(19, train(), ("data/mine.bin is not what was prepared (SHA-256 differs)",), runs(r"prepare it again: (lsys .*)$"), tokens(sidecar=True)),
    Case(20, train(), ("model.vocab: 257 is below the 1000 tokens of corpus data/mine",), also(r"; (\d+) or more", r"--model.vocab \1"), described(vocab=1000)),
    Case(21, train("--model.vocab 50000"), ("notice: model.vocab 50000 is above the 257 tokens",), also(r"; (\d+) does", r"--model.vocab \1"), code=0),
    Case(21, check("--model.vocab 50000"), ("notice: model.vocab 50000 is above the 257 tokens",), also(r"; (\d+) does", r"--model.vocab \1"), code=0),
    Case(43, train(), ("data.validation_fraction: corpus data/one has 1 document",), also(r"data\.validation_fraction (0)", r"--data.validation_fraction \1"),
         lambda: main("data prepare texts/a.txt --out data/one --workers 1".split()) or yaml("data/mine", "data/one")()),
    # Preparing.
    Case(29, prepare("texts"), ("no space left on data (errno 28)", "nothing was kept"), does("free space", lambda: None), full_disk),
    Case(31, prepare("texts", "--out texts/a.txt/new"), ("texts/a.txt/new cannot be written: ",),
         also(r"take another (--out)", r"\1 data/there")),
    Case(32, "data prepare texts --workers 1 --out data/mine", ("data/mine.idx exists",), also(r"(--overwrite)")),
    Case(32, "data prepare --workers 1 --out data/new", ("no source was given",),
         instead("data prepare", r"name files or (folders), or stdlib", "data prepare texts")),
    Case(32, prepare("texts", "--workers 0"), ("0 workers tokenize nothing",), also(r"(--workers \d)")),
    Case(33, prepare("texts", "--out data/"), ("--out data/ is a folder",), also(r"such as (--out \S+)")),
    Case(34, prepare("a.jsonl"), ("a.jsonl, line 1: no key 'text'; there are body, id",), also(r"(--text-column \w+)"), jsonl({"body": "x", "id": 1})),
    Case(34, prepare("a.jsonl"), ("a.jsonl, line 2: not JSON",), edit('{"text": \n', r"must be one JSON object()", '{"text": "b"}\n', "a.jsonl"),
         put("a.jsonl", '{"text": "a"}\n{"text": \n')),
    Case(34, prepare("a.jsonl"), ("line 1: 'text' is NoneType, not text",), also(r"(--text-column)", r"\1 body"), jsonl({"body": "x", "text": None})),
    Case(34, prepare("a.jsonl"), ("line 1: 'text' is int, not text",), also(r"(--text-column)", r"\1 body"), jsonl({"body": "x", "text": 3})),
    Case(35, prepare("texts empty.txt"), ("empty.txt is empty",), also(r"(--empty skip)"), put("empty.txt", "")),
    Case(35, prepare("a.jsonl texts"), ("a.jsonl, line 1 is empty",), also(r"(--empty skip)"), jsonl({"text": ""})),
    Case(35, prepare("notes"), ("folder notes holds no file that ends in .txt",), also(r"but (\.\w+) .*(--suffix)", r"\2 \1"), put("notes/a.note", "text")),
    Case(36, prepare("latin.txt"), ("latin.txt is not UTF-8: byte 3 is 0xe9",), also(r"(--invalid-utf8 \w+)"), put("latin.txt", b"caf\xe9")),
    Case(37, prepare("a.parquet"), ("a.parquet has no column 'text'; it has content",), also(r"(--text-column \w+)"), table("a.parquet", content=["x"])),
    Case(37, prepare("a.parquet"), ("a.parquet is no Parquet file",), does("copy or write it again", table("a.parquet", text=["x"])), put("a.parquet", "PAR")),
    Case(38, prepare("texts", "--tokenizer t.json"), ("t.json is no tokenizer.json",), also(r"or (bytes)", r"--tokenizer \1"), put("t.json", "{}")),
    Case(38, prepare("texts", "--tokenizer t.json"), ("tokenizer t.json not found",), also(r"or (bytes)", r"--tokenizer \1")),
    Case(38, prepare("texts", "--tokenizer t.json"), ("t.json needs a token that ends documents",),
         also(r"(--eod), its special tokens are \['(\w+)'", r"\1 \2"), tokenizer("t.json", "END")),
    Case(39, prepare("texts", "--tokenizer hfm"), ("tokenizer hfm is a folder",), also(r"give (--tokenizer \S+)"), tokenizer("hfm/tokenizer.json")),
    Case(39, prepare("texts", "--tokenizer gpt2"), ("tokenizer gpt2 not found, and nothing is downloaded",), also(r"or (bytes)", r"--tokenizer \1")),
    Case(40, prepare("a.jsonl.gz"), ("a.jsonl.gz is compressed",), then(runs("unpack it: (gunzip .*)$"), instead("a.jsonl.gz", "read (unpacked)", "a.jsonl")),
         lambda: (jsonl({"text": "x"})(), subprocess.run(["gzip", "a.jsonl"], check=True))),
    Case(40, prepare("a.json"), ("a.json is JSON, and read as lines of JSON",), then(runs("if it is: (mv .*)$"), instead("a.json", r"(\S+\.jsonl)$")),
         put("a.json", '{"text": "x"}\n')),
    Case(41, prepare("'texts/*.txt'"), ("texts/*.txt is a pattern",), instead("'texts/*.txt'", "or a (folder)", "texts")),
    Case(41, prepare("-"), ("standard input is not read",), does("write it to a file", lambda: write(Path("-"), "text"))),
    Case(41, prepare("org/name"), ("source org/name does not exist, and nothing is downloaded",),
         instead("org/name", r"save_to_disk\((FOLDER)\)", "saved"), lambda: dataset(Path("saved"), ["a"])),
    Case(41, prepare("hf://org/name"), ("hf://org/name does not exist, and nothing is downloaded",),
         instead("hf://org/name", r"save_to_disk\((FOLDER)\)", "saved"), lambda: dataset(Path("saved"), ["a"])),
    Case(42, prepare("saved"), ("saved has the splits train, test",), also(r"such as (--split \w+)"),
         lambda: dataset_dict(Path("saved"), train=["a"], test=["b"])),
    # Other commands.
    Case(45, "data inspect data/none", ("data/none.bin and data/none.idx not found",), runs(r"; (lsys data prepare .*?) makes them", "texts")),
    Case(45, "data inspect data/mine --document 99999", ("data/mine has no document 99999",), also(r"there are \d+ to (\d+)", r"--document \1")),
    Case(45, "data inspect data/mine --document -1", ("data/mine has no document -1",), also(r"there are (\d+)", r"--document \1")),
    Case(46, "bench scaling run.yaml --ranks 1,2 --out texts", ("--out texts is not empty",), also("name another (folder)", "--out new")),
    Case(46, "bench scaling run.yaml --ranks 2,1 --out new", ("--ranks 2,1 does not ascend",), also(r"as in ([\d,]+)", r"--ranks \1")),
    Case(46, "bench trace texts", ("texts has no trace",), does(r"train\.profile\.first and train\.profile\.steps make some", trace)),
    # What a checkpoint or the run itself would lose.
    Case(22, train("--data.corpora '[{path: data/mine}, {path: data/tok}]'"), ("data/tok was made by tokenizer", "data/mine by bytes"),
         runs(r"prepare it again: (lsys data prepare .*); or"), other_tokenizer),
    Case(23, train("--model.hidden 64 --train.steps 3"), ("model.hidden 32 in the checkpoint, 64 in the config",),
         also(r"start in a new (train\.folder)", r"--\1 other"), trains=True),
    Case(24, train("--data.seed 5 --train.steps 3"), ("data.seed: 5", "whose place in the data"), also(r"(data\.restart)", r"--\1 true"), trains=True),
    Case(24, train("--train.steps 3"), ("resumed after step 2", "train.steps 2 -> 3"), None, code=0, trains=True),
    Case(25, train("--checkpoint.resume run --train.steps 3"), (), None, code=0, trains=True),
    Case(25, train("--checkpoint.resume run/checkpoints --train.steps 3"), (), None, code=0, trains=True),
    Case(26, train("--train.folder other --train.steps 3 --checkpoint.resume runs/nope"), ("runs/nope does not exist",),
         instead("runs/nope", r"or a (run)'s"), trains=True),
    Case(27, train("--checkpoint.resume never --train.steps 3"), ("run/checkpoints/step-00000002", "checkpoint.resume is never"),
         also(r"take another (train\.folder)", r"--\1 other"), trains=True),
    Case(28, train("--train.steps 3"), ("step 3 not written: no space left on run/checkpoints", "newest whole checkpoint is step-00000002"),
         does("free space", lambda: Path("disk is full").unlink()), put("disk is full", ""), code=None, trains=True),
    Case(30, train("--train.folder texts/a.txt/run"), ("train.folder", "texts/a.txt/run"), also(r"another train\.(folder)", r"--train.\1 run")),
    Case(44, train("--train.folder wild --optimizer.lr 1000 --optimizer.clip 0 --train.steps 12"), ("step", "optimizer.lr"),
         also(r"lower optimizer\.(lr)", r"--optimizer.lr 0.001 --train.folder tame"), code=None, trains=True),
]  # fmt: skip
