"""The parts of examples/my_parts, brought by paths, train, resume and generate as lsys's own do, on any degrees."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from support import parity, resuming
from support.comparing import largest

from lsys.config.messages import FilesError

ROOT = Path(__file__).parents[2]
MINE = {
    "model__pattern": ["mine", "softmax"],
    "model__linear": {"heads": 4, "key_heads": 2, "key_dim": 6},
    "model__mixers": {"mine": {"kind": "my_parts.cards:FeatureAttention"}},
}
LION: dict[str, Any] = {
    "optimizer__kind": "my_parts.training:lion",
    "optimizer__distributed": False,
    "optimizer__schedule": "my_parts.training:inverse_root",
    "optimizer__lr": 1e-3,
}


def outcome(rank: int, world_size: int, changes: dict[str, Any]) -> Any:
    return parity.train(rank, world_size, changes).__dict__


# ---- a mixer


def layer(rank: int, world_size: int, shift: float) -> dict[str, float]:
    """Differences from the definition, in fp64: sums over pairs of tokens."""
    from model.test_mixers import LENGTHS, drawn, packed_of

    from lsys.model.megatron_config import transformer_config
    from lsys.model.mixers.mixer import MixerOptions
    from lsys.model.parameters import initialise
    from lsys.parallel.layout import SequenceLayout
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    card = {"kind": "my_parts.cards:FeatureAttention", "shift": shift}
    changes = MINE | {"model__hidden": 12, "model__mixers": {"mine": card}, "model__init_std": 0.4}
    settings = parity.settings(**changes)
    with process_groups(settings.parallel, Launch(rank=rank, world_size=world_size)) as groups:
        from lsys.mixers.registry import module_class

        card = settings.model.cards["mine"]
        options = MixerOptions(card, settings.parallel.linear)
        mixer = module_class(card)(transformer_config(settings), 1, groups.collection, options).double()
        initialise(mixer, settings.model, seed=0)
        x, weigh = drawn(torch.float64)
        x.requires_grad_()
        packed = packed_of(SequenceLayout.contiguous(LENGTHS, 1), 0)
        y = mixer(x[:, None], packed_seq_params=packed)[0][:, 0]
        wanted = torch.cat([defined(part, mixer, shift) for part in x.split(LENGTHS) if len(part)])
        names, parameters = zip(*mixer.named_parameters(), strict=True)
        found = [y, *torch.autograd.grad((y * weigh).sum(), (x, *parameters))]
        expected = [wanted, *torch.autograd.grad((wanted * weigh).sum(), (x, *parameters))]
        pairs = zip(("y", "x", *names), found, expected, strict=True)
        return {name: float((a - b).norm() / b.norm()) for name, a, b in pairs}


def defined(x: torch.Tensor, mixer: Any, shift: float) -> torch.Tensor:
    """One document [n, hidden] by the formula in the mixer's docstring, pair by pair."""
    key_heads, heads, k, v = 2, 4, 6, 8
    projected = (x @ mixer.in_proj.weight.T).view(len(x), key_heads, 2 * k + heads // key_heads * v)
    q, key, value = projected.split((k, k, heads // key_heads * v), dim=-1)
    q, key = (torch.where(z > 0, z, z.exp() - 1) + shift for z in (q, key))
    scores = torch.einsum("ihk,jhk->hij", q, key).tril() * k**-0.5
    o = torch.einsum("hij,jhgv->ihgv", scores, value.view(len(x), key_heads, -1, v)).reshape(len(x), heads, v)
    o = o / (o.square().mean(-1, keepdim=True) + mixer.model.norm_eps).sqrt() * mixer.out_norm.weight.view(heads, v)
    return o.flatten(1) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_the_mixer_is_its_definition(gloo: Any, shift: float) -> None:
    (found,) = gloo(1, layer, shift)
    assert largest(found.values()) < 1e-10, found


DEGREES: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"parallel__tensor": 2}),
    "CP2": (2, {"parallel__context": 2}),
    "PP2": (2, {"parallel__pipeline": 2}),
    "TP2xCP2": (4, {"parallel__tensor": 2, "parallel__context": 2}),
}


@pytest.mark.parametrize("case", DEGREES)
def test_the_mixer_and_the_schedule_equal_one_process(gloo: Any, case: str) -> None:
    shared = MINE | {"optimizer__schedule": "my_parts.training:inverse_root"}
    check(gloo, shared, case)


def check(gloo: Any, shared: dict[str, Any], case: str) -> None:
    ranks, degrees = DEGREES[case]
    one, many = (
        [parity.Outcome(**each) for each in gloo(count, outcome, shared | more)]
        for count, more in ((1, {}), (ranks, degrees))
    )
    found = parity.difference(one, many)
    assert largest(found.values()) <= 1e-5, found


# ---- an optimizer


def adamw(groups: list[dict[str, Any]], options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), eps=options.eps)


def amsgrad(groups: list[dict[str, Any]], options: Any) -> torch.optim.Optimizer:
    """Keeps one more state than the Adam that Megatron makes."""
    return torch.optim.AdamW(groups, amsgrad=True)


OWN_ADAMW = {"optimizer__kind": "train.test_own_parts:adamw", "optimizer__distributed": False}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torchs_adamw_by_its_path_is_lsyss_own(gloo: Any, precision: str) -> None:
    """Bit by bit: gradients, clipping, groups with and without decay, fp32 copies."""
    shared = {"train__precision": precision, "optimizer__distributed": False}
    (own,), (lsys,) = (gloo(1, outcome, shared | more) for more in (OWN_ADAMW, {}))
    assert own["losses"] == lsys["losses"] and own["norms"] == lsys["norms"]


def slow_adamw(groups: list[dict[str, Any]], options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.5, 0.6))


def settings_of_groups(rank: int, world_size: int) -> list[Any]:
    changes = OWN_ADAMW | {"optimizer__kind": "train.test_own_parts:slow_adamw", "optimizer__weight_decay": 0.3}
    with resuming.engine_of(rank, world_size, changes) as engine:
        return [(group["betas"], group["weight_decay"]) for group in engine.optimizer.param_groups]


def test_groups_bring_nothing_of_megatrons_adam(gloo: Any) -> None:
    assert gloo(1, settings_of_groups) == [[((0.5, 0.6), 0.3), ((0.5, 0.6), 0.0)]]


@pytest.mark.parametrize("case", DEGREES)
def test_an_own_optimizer_equals_one_process(gloo: Any, case: str) -> None:
    check(gloo, OWN_ADAMW, case)


def lion_steps(rank: int, world_size: int) -> float:
    """Largest difference of parameters after two steps from Lion's formulas on whole gradients."""
    from lsys.model.parameters import pieces

    with resuming.engine_of(rank, world_size, LION | {"optimizer__clip": 0.0}) as engine:
        (chunk,) = engine.chunks
        wanted = {(p.key, p.offset): p.data.clone() for p in pieces(chunk.module)}
        momentum = {place: torch.zeros_like(data) for place, data in wanted.items()}
        take = engine.step
        for step in range(2):

            def watched(rate: float = 1e-3 * (step + 1) / 4) -> Any:
                for p in pieces(chunk.module, gradients=True):
                    place, decay = (p.key, p.offset), 0.1 if p.data.dim() > 1 else 0.0
                    update = torch.sign(0.9 * momentum[place] + 0.1 * p.data)
                    wanted[place] = wanted[place] * (1 - rate * decay) - rate * update
                    momentum[place] = 0.95 * momentum[place] + 0.05 * p.data
                return take()

            engine.step = watched
            resuming.advance(engine, step, step + 1, resuming.Seen())
        return largest(float((p.data - wanted[p.key, p.offset]).abs().max()) for p in pieces(chunk.module))


def test_lion_is_its_formulas(gloo: Any) -> None:
    assert largest(gloo(1, lion_steps)) < 1e-6  # a step is 5e-4


# ---- resuming


def run(rank: int, world_size: int, changes: dict[str, Any], folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return resuming.run(rank, world_size, changes, folder, **options).__dict__


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, LION | MINE),
        (2, LION | {"train__precision": "bf16"}),
        (2, LION | {"parallel__tensor": 2}),
        (1, OWN_ADAMW | {"train__precision": "bf16", "optimizer__kind": "train.test_own_parts:amsgrad"}),
    ],
)
def test_a_resumed_run_is_bitwise_the_straight_one(
    gloo: Any, tmp_path: Path, ranks: int, changes: dict[str, Any]
) -> None:
    straight = gloo(ranks, run, changes, tmp_path, dict(stop=5, save=(2,)))
    resumed = gloo(ranks, run, changes, tmp_path, dict(stop=5, load="step-00000002"))
    for one, two in zip(straight, resumed, strict=True):
        assert two["losses"] == one["losses"][2:] and two["norms"] == one["norms"][2:]
        assert two["rates"] == one["rates"][2:] and two["counts"] == one["counts"]
        for (_, _, _, a), (_, _, _, b) in zip(one["pieces"], two["pieces"], strict=True):
            assert torch.equal(a, b)


def test_other_degrees_go_on_too(gloo: Any, tmp_path: Path) -> None:
    changes = OWN_ADAMW | MINE
    straight = gloo(1, run, changes, tmp_path, dict(stop=5, save=(2,)))
    resumed = gloo(2, run, changes | {"parallel__tensor": 2}, tmp_path, dict(stop=5, load="step-00000002"))
    assert resumed[0]["losses"] == pytest.approx(straight[0]["losses"][2:], rel=1e-5)


# ---- what is refused before a process group starts


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("no_such.mixers:Mixer", "there is no module no_such.mixers"),
        ("my_parts.mixers:Other", "module my_parts.mixers has no Other"),
        ("my_parts.training:Lion", "it has to be a subclass of lsys.model.mixers.mixer.Mixer"),
    ],
)
def test_a_card_without_a_module(monkeypatch: pytest.MonkeyPatch, module: str, said: str) -> None:
    from lsys.runtime import install_megatron

    install_megatron()
    from my_parts.cards import FeatureAttention

    from lsys.model.own import require_modules

    require_modules(parity.settings(**MINE))
    monkeypatch.setattr(FeatureAttention, "module", module)
    with pytest.raises(FilesError) as caught:
        require_modules(parity.settings(**MINE))
    assert f"model.mixers.mine.kind: the module of FeatureAttention, {module}: " in str(caught.value)
    assert said in str(caught.value)


# ---- an observer


class Optional:
    """Fails when it is made."""

    required = False

    def __init__(self, run: Any) -> None:
        raise OSError("no disk")


class Required(Optional):
    required = True


def test_an_observer_that_cannot_be_made() -> None:
    from lsys.train.observers import own_observers

    def of(name: str) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(train=SimpleNamespace(observers=[f"{__name__}:{name}"])))

    told: list[str] = []
    assert own_observers(of("Optional"), told.append) == [] and "could not be made and is left out" in told[0]
    with pytest.raises(OSError, match="no disk"):
        own_observers(of("Required"), told.append)


# ---- as a user runs them


def lsys(*words: str, launch: tuple[str, ...] = (), path: str = str(ROOT / "examples")) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, *launch, "-m", "lsys", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The example's configuration, of a few steps, with a corpus of these tests."""
    from lsys.data.prepare import PrepareArgs, prepare

    prepare(PrepareArgs(sources=[str(Path(__file__).parent)], out=tmp_path / "tests", suffix=[".py"]))
    tree = yaml.safe_load((ROOT / "examples" / "own_parts.yaml").read_text())
    tree["data"]["corpora"][0]["path"] = str(tmp_path / "tests")
    tree["train"] |= {"folder": str(tmp_path / "run"), "steps": 4, "timeout_minutes": 1}
    tree["checkpoint"]["every"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


@pytest.mark.slow
def test_the_example_trains_on_two_ranks_resumes_and_generates(config: Path, tmp_path: Path) -> None:
    first = lsys("train", str(config), launch=TWO)
    assert first.returncode == 0, first.stdout + first.stderr
    second = lsys("train", str(config), "--train.steps", "6", launch=TWO)
    assert second.returncode == 0 and "resumed after step 4 of 6" in second.stdout, second.stdout + second.stderr
    rows = [line.split("\t") for line in (tmp_path / "run" / "losses.tsv").read_text().splitlines()]
    assert [int(step) for step, _, _ in rows] == [1, 2, 3, 4, 5, 6]
    rates = [5e-4 * min((step + 1) / 4, (4 / (step + 1)) ** 0.5) for step in range(6)]
    assert [float(rate) for _, _, rate in rows] == pytest.approx(rates, rel=1e-5)
    assert float(rows[-1][1]) < float(rows[0][1])

    words = ("generate", str(tmp_path / "run"), "--prompt", "def ", "--tokens", "3", "--tokenizer", "bytes")
    refused = lsys(*words)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    options = refused.stderr.strip().rpartition("repeat it: ")[2].split()
    assert options[::2] == ["--trust"] * 5 and options[1] == "my_parts.cards:FeatureAttention"
    allowed = lsys(*words, *options)
    assert allowed.returncode == 0 and allowed.stdout.startswith("def "), allowed.stderr

    without = lsys("train", str(config), "--train.steps", "8", path="")
    assert without.returncode == 2 and "there is no module my_parts.cards" in without.stderr
    plain = lsys("train", str(config), "--train.steps", "8", "--model.pattern", "LS", "--model.mixers", "{}")
    assert plain.returncode == 2 and "would run code that your own YAML or command line does not name" in plain.stderr


def test_states_are_made_before_loading_and_nothing_else_changes() -> None:
    from lsys.train.own import allocate

    parameters = [torch.nn.Parameter(torch.full((3,), 2.0)), torch.nn.Parameter(torch.ones(2, 2))]
    groups: list[dict[str, Any]] = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.25, weight_decay=0.1)
    allocate(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert all(not optimizer.state[each]["exp_avg"].any() and each.grad is None for each in parameters)
    assert torch.equal(parameters[0], torch.full((3,), 2.0)) and torch.equal(parameters[1], torch.ones(2, 2))
    before = {each: optimizer.state[each]["step"].clone() for each in parameters}
    allocate(optimizer)  # there are states already
    assert all(optimizer.state[each]["step"] == before[each] for each in parameters)
