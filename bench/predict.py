"""Predicted against measured, on this machine: calibrates on four small configurations, judges on twelve others drawn by seed.

    OMP_NUM_THREADS=1 python bench/predict.py --calibration build/this-machine.json --out docs/benchmarks/predict

The calibration is what `lsys check --hardware build/this-machine.json` takes. It fits rates by non-negative least squares to the CPU
time of layers, of the whole step and of the optimizer, and latency and bandwidth to the transfers of two ranks. The measured time of
a judged step is its replay (`lsys.parallel.replay`): the CPU time of each rank's thread in each layer and between its operations, the
least of sixteen steps, as if each rank had a core of its own, and the calibrated link between them. Cores that compute at the same
time slow each other down, so all always do: a case of one rank runs in as many copies as there are cores. The last two columns are
wall-clock, the least of four steps, and its prediction with the cores there are: they mean something on a machine that does nothing
else.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it finds lsys and bench here

import argparse
import json
import os
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from bench.common.tools import launch, made_on
from bench.workers.predict import Case
from lsys.config import Config
from lsys.config.rules import check
from lsys.mixers.card import Layer
from lsys.mixers.registry import CARDS
from lsys.observe.efficiency import commit, hardware_name, versions
from lsys.observe.waterfall import BUBBLE, COMPUTE, CORE, IMBALANCE, exposed
from lsys.parallel.links import NETWORK, NODE, Link
from lsys.predict.activations import Activations
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import Hardware, load
from lsys.predict.seconds import AXES, StepTime
from lsys.predict.traffic import StepTraffic
from lsys.predict.weights import weights
from lsys.predict.work import StageWork, Work, backward

CORES = len(os.sched_getaffinity(0))
PARTS = (COMPUTE, *map(exposed, AXES), "waiting", "other")


def tree(**changes: Any) -> dict[str, Any]:
    """A small configuration; keys with __ for the dot."""
    model = dict(pattern="LLLS", layers=4, hidden=128, heads=4, head_dim=32, groups=2, ffn=320, vocab=512, window=256)
    train = dict(folder="unused", steps=100, batch_tokens=1024, micro_batch_tokens=1024, precision="fp32")
    found: dict[str, Any] = dict(
        model=model, parallel={}, data={"corpora": [{"path": "unused"}]}, optimizer={}, train=train
    )
    for key, value in changes.items():
        section, name = key.split("__")
        found[section][name] = value
    return found


def calibration_cases() -> list[Case]:
    """With a layer of every token mixer: times of others are refused."""
    every = dict(model__pattern=[card.name for card in CARDS], model__layers=len(CARDS))
    large = dict(
        model__hidden=256,
        model__heads=4,
        model__head_dim=64,
        model__ffn=704,
        train__micro_batch_tokens=2048,
        train__batch_tokens=4096,
    )
    two = dict(train__batch_tokens=2048)
    return [
        Case("small", 1, tree(**every, **two), wants_layers=True),
        Case("large", 1, tree(**every, **large), wants_layers=True),
        Case("tensor 2", 2, tree(**two, parallel__tensor=2), wants_layers=True),
        Case("context 2", 2, tree(**every, **two, parallel__context=2), wants_layers=True),
    ]


def drawn_cases(seed: int, count: int) -> list[Case]:
    """Configurations that the rules accept, none of which is a calibration's."""
    draw = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        ranks = draw.choice((1, 2, 2, 4))
        degrees = dict(parallel__tensor=1, parallel__pipeline=1, parallel__context=1)
        left = ranks
        while left > 1:
            axis = draw.choice((*degrees, "parallel__context", "data"))
            if axis in degrees:
                degrees[axis] *= 2
            left //= 2
        width = draw.choice((32, 48, 64))
        tokens = draw.choice((768, 1024, 1536, 2048))
        changes = dict(
            degrees,
            parallel__virtual_pipeline=draw.choice((1, 2)) if degrees["parallel__pipeline"] > 1 else 1,
            parallel__layout=draw.choice(("zigzag", "contiguous")),
            parallel__attention=draw.choice(("auto", "ring", "gather", "ulysses")),
            parallel__linear=draw.choice(("lasp1", "lasp2", "zeco", "ulysses")),
            model__pattern=draw.choice(("LLLS", "DDDS", "MMMS", "GS", "RW", "S", "LGMD")),
            model__layers=draw.choice((4, 8)),
            model__hidden=draw.choice((128, 192, 256)),
            model__head_dim=width,
            model__ffn=draw.choice((320, 512)),
            model__tied=draw.choice((True, False)),
            optimizer__distributed=draw.choice((True, True, False)),
            train__recompute=draw.choice(("none", "selective", "full")),
            train__micro_batch_tokens=tokens,
            train__batch_tokens=4 * tokens,
        )
        if not check(Config.model_validate(tree(**changes)), ranks):
            name = " ".join(f"{k.split('__')[1]} {v}" for k, v in changes.items() if k.split("__")[1] in NAMED)
            cases.append(Case(name, ranks, tree(**changes)))
    return cases


NAMED = (
    "tensor",
    "pipeline",
    "virtual_pipeline",
    "context",
    "pattern",
    "layers",
    "hidden",
    "recompute",
    "attention",
    "linear",
)


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """Results in the order of the cases; those of the same degrees share processes (labels of groups outlive a case)."""
    found: dict[str, Any] = {}
    by_degrees = defaultdict(list)
    for case in cases:
        by_degrees[case.ranks, json.dumps(case.tree["parallel"]) if case.ranks > 2 else ""].append(case)
    for (ranks, _), chosen in sorted(by_degrees.items()):
        print(f"running {len(chosen)} cases of {ranks} ranks", flush=True)
        for case, result in zip(chosen, launch_on_all_cores(chosen, ranks), strict=True):
            found[f"{case.ranks} {case.name}"] = result
    return [found[f"{case.ranks} {case.name}"] for case in cases]


def launch_on_all_cores(cases: list[Case], ranks: int) -> list[dict[str, Any]]:
    """Results of the cases, while copies of them keep the other cores busy.

    Cores that compute at the same time share caches, memory and clock, and are slower than one alone. In a run all of them compute.
    """
    copies = max(1, CORES // ranks)
    with ThreadPoolExecutor(copies) as pool:
        return [*pool.map(lambda _: launch("predict.py", cases, ranks), range(copies))][0]


# ---- the calibration


def calibrate(cases: list[Case], results: list[dict[str, Any]]) -> Hardware:
    rows: list[tuple[Work, float]] = []
    for case, result in zip(cases, results, strict=True):
        rows += observations(case, result)
    costs = fit(rows)
    latency, bandwidth = fit_links(results)
    links = {NODE: Link(latency, bandwidth), NETWORK: Link(latency, bandwidth)}
    return Hardware("this machine", 8, False, None, {}, costs, links, call=0.0, cores=CORES)


def observations(case: Case, result: dict[str, Any]) -> list[tuple[Work, float]]:
    """(quantities, CPU seconds) of layers, of what is beside them, of the optimizer."""
    config = Config.model_validate(case.tree)
    deployment = Deployment(config, case.ranks, gpu=False)
    stage, methods, rows = StageWork(deployment), deployment.methods, []
    times = {tuple(key): seconds for *key, seconds in result["ranks"][0]["layers"]}
    for (module, mixer, channels, way), seconds in times.items():
        kind = Layer(mixer, channels)
        work = stage.layer(kind, methods) if module == "layer" else stage.channels(kind)
        rows.append((work if way == "forward" else backward(work), seconds))
    output = stage.output()
    rows.append((output + backward(output) + Work({"micro_batch": 1}), result["ranks"][0]["output"]))
    rows.append((stage.update(0), min(cpu[1] for cpu in result["ranks"][0]["cpu"])))
    return rows


def fit(rows: list[tuple[Work, float]]) -> dict[str, float]:
    """Seconds for one of each quantity, not negative, with the least sum of squared relative errors."""
    names = sorted({name for work, _ in rows for name in work})
    table = np.array([[work.get(name, 0.0) / seconds for name in names] for work, seconds in rows])
    scale = np.maximum(table.max(0), 1e-30)  # quantities are from 1 to 1e10
    found, _ = nnls(table / scale, np.ones(len(rows)), maxiter=10_000)
    return {name: float(cost) for name, cost in zip(names, found / scale, strict=True)}


def fit_links(results: list[dict[str, Any]]) -> tuple[float, float]:
    """Latency and bandwidth of two ranks' transfers: each takes as long as the one that came last is blocked by it."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for result in results:
        if len(result["ranks"]) == 2:
            for events in zip(*(rank["events"] for rank in result["ranks"]), strict=True):
                axis, kind, size, ranks, _ = events[0]
                if ranks == 2 and kind in ("all_gather", "reduce_scatter", "all_reduce") and size:
                    hops = 2 if kind == "all_reduce" else 1
                    found[hops, size].append(min(event[4] for event in events))
    rows = [(hops, size, float(np.median(times))) for (hops, size), times in found.items()]
    table = np.array([[hops / seconds, size / 1e6 / seconds] for hops, size, seconds in rows])
    latency, slope = nnls(table, np.ones(len(rows)))[0]
    return float(latency), float(1e6 / max(slope, 1e-6))


# ---- the judgement


def judge(case: Case, result: dict[str, Any], hardware: Hardware) -> dict[str, Any]:
    config = Config.model_validate(case.tree)
    deployment = Deployment(config, case.ranks, hardware.ranks_per_node, gpu=False)
    predicted = StepTime(deployment, replace(hardware, cores=None)).predict()
    best = result["replay"]
    wall = min(step["seconds"] for step in result["steps"])
    shared = StepTime(deployment, hardware).predict().seconds
    bytes_exact = held_exact = True
    peaks = []
    for rank, seen in enumerate(result["ranks"]):
        moved = StepTraffic(deployment).bytes(rank)
        told = {" ".join(key): size for key, size in moved.items() if key[0] != "world"}
        bytes_exact &= told == {key: size for key, size in seen["bytes"].items() if size}
        place = deployment.mesh.coordinates(rank)
        held = weights(deployment, place["pipeline"], place["data"] * deployment.mesh.context + place["context"])
        held_exact &= seen["held"] == {key: getattr(held, key) for key in ("parameters", "gradients", "optimizer")}
        peaks.append(Activations(deployment).peak(place["pipeline"]).total / seen["peak"] - 1)
    told_parts, seen_parts = shares(predicted.parts), shares(best["parts"])
    return {
        "name": case.name,
        "ranks": case.ranks,
        "bytes exact": bool(bytes_exact),
        "weights exact": bool(held_exact),
        "activations": max(peaks, key=abs),
        "measured": best["seconds"],
        "predicted": predicted.seconds,
        "error": predicted.seconds / best["seconds"] - 1,
        "wall": wall,
        "wall predicted": shared,
        "measured parts": seen_parts,
        "predicted parts": told_parts,
        "points": float(np.max([abs(told_parts[part] - seen_parts[part]) for part in PARTS])),  # a NaN stays one
    }


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Percent of the step. Imbalance, bubble and waiting for a core are one here: on shared cores one turns into the other."""
    merged: dict[str, float] = defaultdict(float)
    for name, seconds in parts.items():
        merged[name if name in PARTS else "waiting" if name in (IMBALANCE, BUBBLE, CORE) else "other"] += seconds
    total = sum(parts.values())
    return {part: 100 * merged[part] / total for part in PARTS}


def table(rows: list[dict[str, Any]]) -> str:
    heads = [
        "ranks",
        "configuration",
        "bytes",
        "weights",
        "activations",
        "measured ms",
        "predicted ms",
        "error",
        "parts, points",
        "wall ms",
        "predicted ms",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [
            row["ranks"],
            row["name"],
            *("exact" if row[k] else "DIFFER" for k in ("bytes exact", "weights exact")),
        ]
        cells += [f"{100 * row['activations']:+.1f}%", f"{1e3 * row['measured']:.0f}", f"{1e3 * row['predicted']:.0f}"]
        cells += [f"{100 * row['error']:+.0f}%", f"{row['points']:.1f}"]
        cells += [f"{1e3 * row['wall']:.0f}", f"{1e3 * row['wall predicted']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def reached(rows: list[dict[str, Any]]) -> str:
    """How many rows are within the targets."""
    targets = {
        "bytes exact": lambda row: row["bytes exact"],
        "parameters and optimizer exact": lambda row: row["weights exact"],
        "activations within 10%": lambda row: abs(row["activations"]) <= 0.10,
        "step time within 20%": lambda row: abs(row["error"]) <= 0.20,
        "parts within 5 points": lambda row: row["points"] <= 5,
    }
    return f"Of {len(rows)}: " + ", ".join(f"{name} {sum(map(met, rows))}" for name, met in targets.items()) + "."


def summary(seed: int, rows: list[dict[str, Any]]) -> str:
    return f"Seed {seed}. {reached(rows)}\n\n{table(rows)}"


def write(out: Path, seed: int, rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """The page and the figures that it is made of."""
    out.with_suffix(".json").write_text(json.dumps({**where, "seed": seed, "rows": rows}, indent=1) + "\n")
    page = f"# Predicted against measured\n\n{__doc__}\n{made_on(**where)}.\n\n{summary(seed, rows)}\n"
    out.with_suffix(".md").write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True, help="made if it is not there")
    parser.add_argument("--out", type=Path, help="without ending: .json and .md are written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12)
    options = parser.parse_args()
    if not options.calibration.exists():
        cases = calibration_cases()
        hardware = calibrate(cases, run(cases))
        options.calibration.parent.mkdir(parents=True, exist_ok=True)
        options.calibration.write_text(json.dumps(hardware.to_json(), indent=1) + "\n")
    hardware = load(options.calibration)
    links = (hardware.links[NODE].latency, hardware.links[NODE].bandwidth)
    cases = [replace(case, links=links) for case in drawn_cases(options.seed, options.count)]
    rows = [judge(case, result, hardware) for case, result in zip(cases, run(cases), strict=True)]
    print(summary(options.seed, rows))
    for row in rows:
        print(row["ranks"], row["name"])
        for side in ("measured parts", "predicted parts"):
            print("   ", side, " ".join(f"{part} {share:.1f}" for part, share in row[side].items() if share >= 0.05))
    if options.out:
        where = {"hardware": hardware_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
        write(options.out, options.seed, rows, where)


if __name__ == "__main__":
    main()
