"""The proxy for torch inside megatron.core: there, and only there."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the proxy is not installed")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_megatron_sees_the_cpu_and_torch_is_left_alone() -> None:
    done = python(
        "import torch; before = torch.zeros, torch.cuda\n"
        "from lsys.runtime import install_megatron; install_megatron(); install_megatron()\n"
        "import megatron.core.tensor_parallel.layers as layers\n"
        "assert layers.torch.cuda.current_device() == torch.device('cpu')\n"
        "assert layers.torch.zeros(2, device='cuda').device.type == 'cpu'\n"
        "x = torch.ones(2)\n"
        "assert x.type() == 'torch.FloatTensor' == x.type() == 'torch.cuda.FloatTensor' != x.double().type()\n"
        "assert x.type(torch.float64).dtype == torch.float64 and x.type('torch.IntTensor').dtype == torch.int32\n"
        "assert (torch.zeros, torch.cuda) == before and not torch.cuda.is_available()\n"
        "try: torch.zeros(2, device='cuda')\n"
        "except (AssertionError, RuntimeError): print('still refused')"
    )
    assert done.stdout.strip() == "still refused", done.stderr


def test_too_late_is_an_error() -> None:
    done = python(
        "import megatron.core\nfrom lsys.runtime import install_megatron\n"
        "try: install_megatron()\nexcept RuntimeError as error: print(error)"
    )
    assert "call that first" in done.stdout, done.stderr
