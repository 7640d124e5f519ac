"""Reading torch's `.metadata`, which is a raw pickle, without letting it run anything.

A pickle may call whatever it can name. Here it can name only the few classes that describe tensors and where they lie in files.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch

ALLOWED = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def load_restricted(data: bytes) -> Any:
    """Unpickle `data` if it names nothing but ALLOWED and torch's dtypes; else UnpicklingError, with nothing called."""
    return _Unpickler(io.BytesIO(data)).load()


def load_metadata(file: Path) -> Any:
    """torch's Metadata of a checkpoint. Raises UnpicklingError that names the file where it holds anything else."""
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        metadata = load_restricted(file.read_bytes())
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise pickle.UnpicklingError(f"{file} is refused: {error}") from None
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{file} is refused: it holds a {type(metadata).__name__}, not torch's Metadata")
    return metadata
