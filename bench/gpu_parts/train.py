"""Section `train` of `bench/gpu.py`: the trainer itself on one GPU, and the tests that need one.

The corpus is the source of Python's standard library, byte by byte. Needs what `lsys` installs; skipped without.
"""

import importlib.util
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.common.tree import ROOT

Case = dict[str, Any]
NEEDED = (
    "megatron.core",
    "numpy",
    "pydantic",
    "rich",
    "safetensors",
    "scipy",
    "tensorboard",
    "tokenizers",
    "tyro",
    "yaml",
)
LINE = re.compile(
    r"step +(\d+)/\d+ \| loss ([\d.]+|nan) \| ([\d,]+) tokens/s(?: \| mfu ([\d.]+)%)? \| memory ([\d.]+) GiB", re.I
)

# The 1B recipes on one GPU: a vocabulary of bytes, a batch of four micro-batches that fit.
ONE_GPU = (
    "--parallel.context=1", "--model.vocab=257", "--train.batch_tokens=65536", "--train.micro_batch_tokens=16384",
    "--optimizer.warmup_steps=5", "--train.validate_every=0", "--train.validate_tokens=16384",
)  # fmt: skip


def groups(smoke: bool, scratch: str) -> list[list[Case]]:
    def train(config: str, steps: int, *words: str) -> Case:
        return dict(
            name=f"{config}, {steps} steps", kind="run", config=config, steps=steps, words=words, folder=scratch
        )

    if smoke:
        return [[train("quickstart", 4, "--train.validate_tokens=1024", "--optimizer.warmup_steps=1")]]
    return [
        [
            train("quickstart", 60, "--train.precision=bf16"),
            dict(name="pytest -k cuda", kind="tests"),
            train("hybrid_1b", 20, *ONE_GPU),
            train("delta_1b", 20, *ONE_GPU),
        ]
    ]


def lacking(names: tuple[str, ...]) -> list[str]:
    def is_there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ImportError:  # its parent is missing
            return False

    return [name for name in names if not is_there(name)]


def command(*words: str) -> str:
    """What `python -m ...` says.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout + done.stderr


def train(case: Case) -> Case:
    corpus = Path(case["folder"]) / "corpus"
    if not corpus.with_suffix(".json").exists():
        command("lsys", "data", "prepare", "stdlib", "--out", str(corpus))
    words = [
        f"--data.corpora=[{{path: {corpus}}}]", f"--train.folder={case['folder']}/{case['config']}", "--checkpoint.save=false",
        f"--train.steps={case['steps']}", f"--metrics.every={max(case['steps'] // 10, 1)}",
    ]  # fmt: skip
    said = command("lsys", "train", f"configs/{case['config']}.yaml", *words, *case["words"])
    lines = LINE.findall(said)
    if len(lines) < 3:
        raise RuntimeError(f"too few steps in: {said[-1500:]}")
    steady = lines[len(lines) // 2 :]  # kernels are compiled in the first steps
    first, last = float(lines[0][1]), float(lines[-1][1])
    found = {"first loss": first, "last loss": last, "peak GiB": max(float(line[4]) for line in lines)}
    found["tokens/s"] = statistics.median(float(line[2].replace(",", "")) for line in steady)
    if steady[0][3]:
        found["MFU %"] = statistics.median(float(line[3]) for line in steady)
    falls = last < first  # also false of NaN
    return {"status": "measured" if falls else "failed", "error": "" if falls else "the loss does not fall"} | {
        "found": found
    }


def tests() -> Case:
    """The suite's tests of CUDA; they skip themselves where there is none."""
    if missing := lacking(("pytest", "hypothesis")):
        return {"status": "skipped", "error": f"lacks {', '.join(missing)}"}
    words = ["-k", "cuda", "-p", "no:cacheprovider", "tests/kernels", "--no-header"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
    status = "passed" if done.returncode == 0 else "failed"
    return {
        "status": status,
        "error": "" if status == "passed" else done.stdout[-1500:],
        "found": {"tests": done.stdout.strip().split("\n")[-1]},
    }


def run(case: Case) -> Case:
    if case["kind"] == "tests":
        return tests()
    missing = lacking(NEEDED)
    return {"status": "skipped", "error": f"lacks {', '.join(missing)}"} if missing else train(case)
