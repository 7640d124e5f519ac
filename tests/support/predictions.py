"""Everything that the predictor says of a configuration, as plain numbers: to be held against what an earlier version said."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lsys.config.schema import Config
from lsys.observe.flops import flops_per_token, parameters
from lsys.predict.activations import Activations
from lsys.predict.hardware import Hardware
from lsys.predict.plan import Plan
from lsys.predict.traffic import StepTraffic


def predictions(config: Config, ranks: int, hardware: Hardware) -> dict[str, Any]:
    """Weights, bytes, activations, FLOPs and seconds of a configuration that passes the rules. Numbers alone: no name of a mixer."""
    plan = Plan(config, ranks, hardware)
    activations, traffic = Activations(plan.deployment), StepTraffic(plan.deployment)
    peaks = [activations.peak(stage) for stage in range(plan.deployment.mesh.pipeline)]
    seen = sorted({*range(min(ranks, 4)), ranks - 1})
    moved = {axis: found.moved(axis) for axis, found in sorted(plan.traffic().items())}
    return {
        "weights": [asdict(held) for held in plan.weights],
        "activations": [{"held": sorted(peak.held.values()), "rest": peak.rest} for peak in peaks],
        "bytes": [{" ".join(key): size for key, size in sorted(traffic.bytes(rank).items())} for rank in seen],
        "most bytes": moved,
        "parameters": list(parameters(config.model).values()),
        "flops": list(flops_per_token(config.model, plan.deployment.documents).values()),
        "seconds": plan.prediction.seconds,
        "parts": plan.prediction.parts,
        "mfu": plan.mfu,
    }
