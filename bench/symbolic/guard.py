"""The device guard of guard.cpp, compiled once for each torch and loaded."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from bench.common.tree import ROOT

SOURCE = Path(__file__).parent / "guard.cpp"


def compiler() -> str | None:
    return shutil.which("g++")


def install() -> Callable[[int], None]:
    """Tensors of CUDA can be made in this process afterwards, though not computed with.

    Returns:
        What sets the device that "cuda" means.

    Raises:
        RuntimeError: there is no compiler, or this torch can compute on CUDA itself.
    """
    if torch.version.cuda is not None:
        raise RuntimeError(f"torch {torch.__version__} is built with CUDA; the symbolic step wants a CPU build")
    library = ctypes.CDLL(str(_library()))
    library.install()
    found: Callable[[int], None] = library.set_device
    return found


def _library() -> Path:
    key = hashlib.sha256(f"{torch.__version__} {sysconfig.get_platform()} {SOURCE.read_text()}".encode()).hexdigest()[
        :12
    ]
    path = ROOT / "build" / "symbolic" / f"guard-{key}.so"
    if path.exists():
        return path
    found = compiler()
    if found is None:
        raise RuntimeError("the symbolic step compiles 40 lines of C++ once, and g++ is not on the PATH")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder) / path.name
        includes = [f"-I{folder}" for folder in include_paths()]
        links = [f"-L{folder}" for folder in library_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        command = [found, "-O0", "-shared", "-fPIC", "-std=c++20", abi, *includes, str(SOURCE), "-o", str(new), *links]
        subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
        os.replace(new, path)  # whole, whoever else compiles it now
    return path
