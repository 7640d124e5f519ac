"""Recompute: mixers really run again in backward (Megatron's own selective mode would do nothing for them), gradients stay."""

from typing import Any

import pytest


def calls_of_mix(rank: int, world_size: int, recompute: str) -> dict[str, Any]:
    from support import parity

    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.data.plan import Planner
    from lsys.model.mixers.lightning import LightningMixer
    from lsys.model.mixers.softmax import SoftmaxMixer
    from lsys.model.parameters import pieces
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups
    from lsys.train.engine import Engine

    counts = {"S": 0, "L": 0}
    for kind, mixer in (("S", SoftmaxMixer), ("L", LightningMixer)):
        if not hasattr(mixer, "counted"):
            mixer.counted = original = mixer.mix  # type: ignore[attr-defined]
        original = mixer.counted  # type: ignore[attr-defined]

        def mix(self: Any, *args: Any, _kind: str = kind, _original: Any = original) -> Any:
            counts[_kind] += 1
            return _original(self, *args)

        mixer.mix = mix  # type: ignore[method-assign, assignment]
    settings = parity.settings(train__recompute=recompute)
    with process_groups(settings.parallel, Launch()) as groups:
        engine = Engine(settings, groups)
        plan = Planner(parity.RandomDocuments(61), 4 * 97, 97).step(0)  # type: ignore[arg-type]
        engine.forward_backward(plan.on_rank(0, groups.device))
        gradients = {p.key: p.data.clone() for c in engine.chunks for p in pieces(c.module, gradients=True)}
    return {"counts": counts, "gradients": gradients}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_mixers_run_again(gloo: Any, recompute: str) -> None:
    plain = gloo(1, calls_of_mix, "none")[0]
    again = gloo(1, calls_of_mix, recompute)[0]
    assert plain["counts"] == {"S": 4, "L": 12}  # 4 micro-batches, LLLS
    assert again["counts"] == {"S": 8, "L": 24}
    for key, gradient in plain["gradients"].items():
        assert (gradient - again["gradients"][key]).norm() <= 1e-6 * gradient.norm(), key
