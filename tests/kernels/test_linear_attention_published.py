"""Against independent public definitions, where their packages are installed."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.linear_kernels import tensors

from lsys.kernels.linear_attention import linear_attention
from lsys.runtime import install_megatron

LENGTHS, BATCH = [77, 77], 2


def naive(operation, monkeypatch):
    """The module `naive` of an operation of flash-linear-attention, whose package itself wants a GPU: loaded by its path."""
    package = importlib.util.find_spec("fla")
    if package is None:
        pytest.skip("flash-linear-attention is not installed")
    if importlib.util.find_spec("einops") is None:  # the token by token definitions do not use it
        monkeypatch.setitem(sys.modules, "einops", SimpleNamespace(rearrange=None))
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{operation}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(inputs, theirs):
    """Theirs takes q, k, v, log_decay, beta, initial state with as many key heads as heads, and computes in fp32."""
    q, k, v, state, log_decay, beta = inputs[:6]
    o, after = linear_attention(q, k, v, log_decay, beta, initial_state=state, output_final_state=True)
    their_o, their_after = theirs(q, k, v, log_decay, beta, state)
    torch.testing.assert_close(o, their_o, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(after, their_after, atol=2e-5, rtol=2e-5)
    loss, their_loss = (
        (x * inputs.do).sum() + (y * inputs.d_state).sum() for x, y in ((o, after), (their_o, their_after))
    )
    grads, their_grads = (torch.autograd.grad(x, inputs.leaves) for x in (loss, their_loss))
    for x, y in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=2e-4)


def inputs(variant):
    return tensors(variant, LENGTHS, torch.float32, batch=BATCH, key_heads=4)


def test_scalar_gate(monkeypatch):
    module = naive("simple_gla", monkeypatch)
    check(inputs("token"), lambda q, k, v, g, _, s: module.naive_recurrent_simple_gla(q, k, v, g, None, s))


def test_channel_gate(monkeypatch):
    module = naive("gla", monkeypatch)
    check(inputs("channel"), lambda q, k, v, g, _, s: module.naive_recurrent_gla(q, k, v, g, s, True))


def test_delta_rule(monkeypatch):
    module = naive("delta_rule", monkeypatch)

    def theirs(q, k, v, _, beta, state):
        o, after = module.delta_rule_recurrence(*(x.transpose(1, 2) for x in (q, k, v, beta)), state)
        return o.transpose(1, 2), after

    check(inputs("delta none"), theirs)


def test_gated_delta_rule(monkeypatch):
    module = naive("gated_delta_rule", monkeypatch)

    def theirs(q, k, v, log_decay, beta, state):
        return module.naive_recurrent_gated_delta_rule(q, k, v, beta, log_decay, None, state, True)

    check(inputs("delta token"), theirs)


def test_channel_gated_delta_rule(monkeypatch):
    module = naive("kda", monkeypatch)

    def theirs(q, k, v, log_decay, beta, state):
        return module.naive_recurrent_kda(q, k, v, log_decay, beta, None, state, True)

    check(inputs("delta channel"), theirs)


def test_gated_delta_rule_of_megatron():
    install_megatron()  # before its first import in this process, whichever test does it
    module = pytest.importorskip("megatron.core.ssm.gated_delta_net")

    def theirs(q, k, v, log_decay, beta, state):
        return module.torch_chunk_gated_delta_rule(
            q, k, v, log_decay, beta, initial_state=state, output_final_state=True
        )

    check(inputs("delta token"), theirs)
