"""Configurations with some keys changed."""

from typing import Any

from lsys.config.schema import Config

STEP = 1 << 20


def make(**changes: Any) -> Config:
    """A configuration that runs on one rank, with `section__key` (or `section__inner__key`) changed."""
    tree: dict[str, Any] = {
        "model": dict(layers=16, hidden=96, heads=12, head_dim=8, ffn=96, vocab=96, vocab_multiple=96),
        "parallel": {},
        "data": {"corpora": [{"path": "a"}]},
        "optimizer": {},
        "train": dict(folder="out", steps=10, batch_tokens=STEP, micro_batch_tokens=1024),
        "checkpoint": {},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return Config.model_validate(tree)
