"""megatron-core on a machine without CUDA: a proxy for the name `torch` inside `megatron.core` modules, and nothing else.

Megatron names CUDA in factories (`device="cuda"`), streams and its random-number tracker. Where CUDA is absent, `install_megatron` puts an import
hook in place that gives megatron's modules a `torch` whose few CUDA names act on the CPU. `torch` itself keeps its behaviour, so nothing else in the
process notices, ordinary operations cost nothing extra, and torch.compile works. Where CUDA is present the function only silences import noise.
"""

import contextlib
import importlib.machinery
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any


def install_megatron() -> None:
    """Make `import megatron.core` work on this machine. Call before the first such import; calling again does nothing.

    Raises RuntimeError if megatron was imported before on a machine without CUDA: its modules would hold the plain torch.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron asks for it with tensor parallelism
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")
    # torch 2.13 renamed collectives that megatron calls, and warns once per process and name.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    import torch

    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before lsys.runtime.install_megatron(); call that first")
    sys.meta_path.insert(0, _Finder(_cpu_torch()))
    _patch_tensor_methods()


class _Proxy:
    """A module with some names replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Idle:
    """Stands in for a CUDA stream or event: every method does nothing and returns the object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Idle)

    __hash__ = None  # type: ignore[assignment]


class _TypeName(str):
    """'torch.FloatTensor', which also equals 'torch.cuda.FloatTensor': megatron's optimizer compares such names."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, str(other).replace("torch.cuda.", "torch."))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _on_cpu(factory: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)  # there is no device to copy to
        return factory(*args, **kwargs)

    return make


def _cpu_torch() -> _Proxy:
    import torch

    cuda = _Proxy(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *args: None,
        Stream=_Idle,
        Event=_Idle,
        current_stream=_Idle,
        default_stream=_Idle,
        manual_seed=torch.manual_seed,
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in ("tensor", "zeros", "ones", "empty", "empty_like")}
    return _Proxy(torch, cuda=cuda, **factories)


def _get_rng_state(*args: Any, **kwargs: Any) -> Any:
    import torch

    return torch.get_rng_state()


def _set_rng_state(state: Any, *args: Any, **kwargs: Any) -> None:
    import torch

    torch.set_rng_state(state)


def _patch_tensor_methods() -> None:
    import torch

    tensor_type = torch.Tensor.type

    def type_(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor_type(tensor, *args, **kwargs) if args or kwargs else _TypeName(tensor_type(tensor))

    torch.Tensor.type = type_  # type: ignore[assignment, method-assign]
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]


@contextlib.contextmanager
def _fork(self: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """`CudaRNGStatesTracker.fork` where the CPU generator is the device's."""
    outer = _get_rng_state()
    _set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = _get_rng_state()
        _set_rng_state(outer)


class _Finder:
    """Finds `megatron.core` modules and loads them with the CPU's `torch`."""

    def __init__(self, proxy: _Proxy) -> None:
        self.proxy = proxy

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(name, spec.loader.path, self.proxy)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, proxy: _Proxy) -> None:
        super().__init__(name, path)
        self.proxy = proxy

    def exec_module(self, module: ModuleType) -> None:
        import torch

        super().exec_module(module)
        names: Any = module.__dict__
        if names.get("torch") is torch:
            names["torch"] = self.proxy
        if self.name == "megatron.core.jit":
            names["disable_jit_fuser"]()  # torch.compile of tiny functions: minutes of compilation for nothing on a CPU
        elif self.name == "megatron.core.tensor_parallel.random":
            names["_get_cuda_rng_state"], names["_set_cuda_rng_state"] = _get_rng_state, _set_rng_state
            names["CudaRNGStatesTracker"].fork = _fork
