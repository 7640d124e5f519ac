"""Runs to plant faults in: the trainer as users start it, on this machine, with what it does written down by `watch.py`."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from bench.common.tree import ROOT, with_checkout

CONFIG: dict[str, Any] = {
    "model": {"pattern": "LS", "layers": 2, "hidden": 64, "heads": 4, "groups": 2, "head_dim": 16, "vocab": 257},
    "data": {
        "corpora": [{"path": str(ROOT / "data" / "stdlib")}], "validation_fraction": 0.02, "shuffle_window": 64, "verify": False
    },
    "optimizer": {"lr": 0.003, "warmup_steps": 2},
    "train": {
        "steps": 24, "batch_tokens": 2048, "micro_batch_tokens": 512, "precision": "fp32", "validate_every": 8,
        "validate_tokens": 4096, "timeout_minutes": 1, "observers": ["bench.fault_parts.watch:Watch"],
    },
    "checkpoint": {"every": 4, "keep": 3},
    "metrics": {"every": 1, "waterfall_every": 0},
}  # fmt: skip


@dataclass
class Job:
    """A run of some ranks under torchrun, in a folder of its own.

    Attributes:
        folder: of the run. ranks: how many. slow: seconds that steps and pauses last at least. words: options beside the configuration.
    """

    folder: Path
    ranks: int = 2
    slow: float = 0.05
    words: Sequence[str] = ()
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    began: float = field(default=0.0, init=False)

    def start(self) -> "Job":
        corpus = Path(CONFIG["data"]["corpora"][0]["path"])
        if not corpus.with_suffix(".idx").exists():
            raise SystemExit(f"{corpus} is not there, which runs are to read: make {corpus.relative_to(ROOT)}.json")
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.yaml"
        tree = {**CONFIG, "train": {**CONFIG["train"], "folder": str(self.folder)}}
        config.write_text(yaml.safe_dump(tree))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        command += ["--max-restarts", "3", "-m", "lsys", "train", str(config), *self.words]
        environment = with_checkout(
            # as launch/run.sh has it: else ranks that are started anew read addresses of the dead in torchrun's store
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            OMP_NUM_THREADS="1",
            LSYS_EVENTS=str(self.folder / "events"),
            LSYS_SLOW=str(self.slow),
        )
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.began = time.time()
        return self

    def workers(self) -> list[int]:
        """Process ids of the ranks: children of the agent, in the order in which they were started."""
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in children.read_text().split()] if children.exists() else []

    def events(self) -> list[dict[str, Any]]:
        """All ranks' lines, in time."""
        lines = [line for path in (self.folder / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
        return sorted((json.loads(line) for line in lines if line.endswith("}")), key=lambda event: event["time"])

    def wait_for(self, event: str, step: int = 0, after: float = 0.0, limit: float = 120.0) -> bool:
        """Whether such an event of such a step, or a later one, came within so many seconds."""
        assert self.process
        end = time.time() + limit
        while time.time() < end:
            if any(e["event"] == event and e["step"] >= step and e["time"] > after for e in self.events()):
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.01)
        return False

    def wait_for_rank(self, rank: int, limit: float = 60.0) -> bool:
        """Whether the process of a rank came within so many seconds."""
        end = time.time() + limit
        while time.time() < end and len(self.workers()) <= rank:
            time.sleep(0.01)
        return len(self.workers()) > rank

    def wait(self, limit: float = 240.0) -> int | None:
        assert self.process
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Kill what is left of it, ranks too: they are in sessions of their own, and nobody's children once torchrun is gone."""
        if self.process and self.process.poll() is None:
            workers = self.workers()
            os.killpg(self.process.pid, signal.SIGKILL)
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            self.process.wait()

    def losses(self) -> dict[int, set[tuple[str, str]]]:
        """Exact losses and norms that any rank saw at each step, over all restarts."""
        found: dict[int, set[tuple[str, str]]] = {}
        for event in self.events():
            if event["event"] == "step":
                found.setdefault(event["step"], set()).add((event["loss"], event["norm"]))
        return found

    def text(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def last_words(self) -> str:
        """What it said at last; torchrun's own account of a failure alone takes 2,000."""
        return self.text()[-5000:]


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run that have their final name, by step."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit())


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor, read by torch's own reader."""
    reader = FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata.items()
    held = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in stored if isinstance(m, TensorStorageMetadata)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it reads in one process
        load(held, storage_reader=reader, no_dist=True)
    return dict(sorted(held.items()))


def tensors(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor."""
    bits = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy() for name, tensor in stored(checkpoint).items()}
    return {name: hashlib.sha256(held.tobytes()).hexdigest() for name, held in bits.items()}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
