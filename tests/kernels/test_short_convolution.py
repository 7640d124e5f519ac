"""The short convolution against its definition, which is checked against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from support.comparing import largest

from lsys.kernels.short_convolution import before_next, short_convolution

PACKS = [[0, 1, 7, 2, 0, 23], [300], [1, 0, 1], [], [0], [2, 67, 5, 3, 19]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
CHANNELS = 3


def tensors(lengths, width, dtype=torch.float64):
    """x, weight, bias, initial, gradient of the output."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    shapes = [(sum(lengths), CHANNELS), (CHANNELS, width), (CHANNELS,), (len(lengths), width - 1, CHANNELS)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (*shapes, shapes[0])]
    return [x.to(dtype) for x in drawn]


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def run(tensors, lengths, bias, initial, activation, backend):
    """The output and the gradients of x, weight, bias, initial."""
    x, weight, b, state, grad = (tensor.clone() for tensor in tensors)
    leaves = [x, weight, *([b] if bias else []), *([state] if initial else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    options = dict(cu_seqlens=bounds(lengths), initial=state if initial else None, activation=activation)
    y = short_convolution(x, weight, b if bias else None, backend=backend, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad, materialize_grads=True)]


def error(x, y):
    assert x.shape == y.shape
    return largest(((x.double() - y.double()).abs() / (1 + y.double().abs())).flatten().tolist())


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_definition(width, dtype):
    for lengths in PACKS:
        for bias, initial, activation in [(False, False, None), (True, False, "silu"), (True, True, "silu")]:
            given = tensors(lengths, width, dtype)
            found = run(given, lengths, bias, initial, activation, "auto")
            wanted = run([x.double() for x in given], lengths, bias, initial, activation, "reference")
            for x, y in zip(found, wanted, strict=True):
                assert x.dtype == dtype and error(x, y) < TOLERANCE[dtype] * max(1, sum(lengths) ** 0.5), lengths


def test_blocks_meet(monkeypatch):
    """Where rows are cut in blocks, nothing is lost or counted twice."""
    monkeypatch.setattr("lsys.kernels.short_convolution.sliding._BLOCK", 1)  # 16 rows
    lengths = [5, 131, 40]
    found, wanted = (run(tensors(lengths, 4), lengths, True, True, None, each) for each in ("sliding", "reference"))
    assert largest(map(error, found, wanted)) < 1e-12


@pytest.mark.parametrize("width", [1, 4])
def test_is_torchs_causal_convolution(width):
    x, weight, bias, *_ = tensors([50], width)
    expected = F.conv1d(F.pad(x.T, (width - 1, 0))[None], weight[:, None], bias, groups=CHANNELS)[0].T
    assert error(short_convolution(x, weight, bias, activation="silu"), F.silu(expected)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_changes_only_those_from_there_on_in_its_document(dtype):
    lengths = [11, 40, 17]
    x, weight, bias, *_ = tensors(lengths, 4, dtype)
    y = short_convolution(x, weight, bias, cu_seqlens=bounds(lengths))
    for at in (11, 30, 49, 50):
        changed = x.clone()
        changed[at] = torch.nan
        other = short_convolution(changed, weight, bias, cu_seqlens=bounds(lengths))
        sees = slice(at, min(at + 4, 51))
        assert other[sees].isnan().all()
        assert torch.equal(torch.cat([y[:at], y[sees.stop :]]), torch.cat([other[:at], other[sees.stop :]]))


@pytest.mark.parametrize("width", [1, 4])
def test_token_by_token_is_all_at_once(width):
    x, weight, bias, initial, _ = tensors([23], width)
    expected = short_convolution(x, weight, bias, initial=initial)
    outputs, state = [], initial
    for part in x.split([1, 1, 2, 7, 0, 12]):
        outputs.append(short_convolution(part, weight, bias, initial=state))
        state = before_next(part, width - 1, state)
    assert error(torch.cat(outputs), expected) < 1e-14
    assert state.shape == (1, width - 1, CHANNELS)


def test_gradients_are_derivatives():
    x, weight, bias, initial, _ = (tensor.requires_grad_() for tensor in tensors([2, 5], 3))
    cu_seqlens = bounds([2, 5])

    def convolution(x, weight, bias, initial):
        return short_convolution(x, weight, bias, cu_seqlens=cu_seqlens, initial=initial, activation="silu")

    assert torch.autograd.gradcheck(convolution, (x, weight, bias, initial))


def test_wrong_uses_are_refused():
    x, weight, bias, initial, _ = tensors([6], 4)
    refused = [
        ((x[0], weight), {}, "takes x .T, C. and weight .C, W.; got .3. and .3, 4."),
        ((x, weight[:2]), {}, "got .6, 3. and .2, 4."),
        ((x, weight[:, :0]), {}, "got .6, 3. and .3, 0."),
        ((x, weight, bias[:2]), {}, "bias is .2.; there are 3 channels"),
        ((x, weight), {"cu_seqlens": torch.tensor([0, 5])}, "goes from 0 to T = 6 and does not decrease; got .0, 5."),
        ((x, weight), {"cu_seqlens": torch.tensor([0, 5, 3, 6])}, "does not decrease"),
        ((x, weight), {"initial": initial[:, :1]}, "initial is .1, 1, 3.; .N, W - 1, C. makes it .1, 3, 3."),
        ((x, weight), {"activation": "relu"}, "activation 'relu' is not one of: None, silu"),
        ((x, weight), {"backend": "cuda"}, "backend 'cuda' is not one of: auto, reference, sliding, triton"),
        ((x, weight), {"backend": "triton"}, "backend 'triton' takes fp32, bf16 and fp16, not torch.float64"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            short_convolution(*arguments, **options)
