"""The step for CUDA at many ranks, without CUDA: it runs as it is, waits for nothing, keeps its streams in order and its memory as predicted."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lsys.mixers.registry import LETTERS

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as path:  # bench is no installed package
    path.syspath_prepend(str(ROOT))
    from bench.symbolic.cases import Case, Result, outcomes
    from bench.symbolic.planted import IN_MIXERS
    from bench.symbolic.table import PATTERNS, figures, mixers, recipe_cases

TABLE = ROOT / "docs" / "benchmarks" / "gpu-counts.json"
CONTEXTS = (8, 64)
COUNTED = {f"{pattern} context {context}": mixers(context, pattern) for context in CONTEXTS for pattern in PATTERNS}
RECIPES = dict(list(recipe_cases().items())[:1])
SMALL = (
    "model.pattern=LS",
    "model.layers=2",
    "parallel.context=2",
    "train.micro_batch_tokens=4096",
    "train.batch_tokens=4096",
)
ORDINARY = Case("configs/hybrid_1b.yaml", 2, 0, SMALL, micro_batches=1)
HOST_TENSOR, UNWAITED = "a tensor of the host in a kernel", "a message that is not waited for"

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the device guard is compiled once, by g++")


PLANTED = (*IN_MIXERS, UNWAITED)


@functools.cache
def outcome() -> dict[str, Result | str]:
    """All steps in one go: each is a process of its own, forked from one that has loaded torch and Megatron."""
    planted = {name: dataclasses.replace(ORDINARY, planted=name) for name in PLANTED}
    cases = {**COUNTED, **RECIPES, "small": ORDINARY, **planted}
    return dict(zip(cases, outcomes(list(cases.values())), strict=True))


def found(name: str) -> Result:
    result = outcome()[name]
    assert isinstance(result, Result), result
    return result


def test_every_mixer_is_in_a_pattern() -> None:
    assert set("".join(PATTERNS)) == set(LETTERS)


@pytest.mark.parametrize("name", [*COUNTED, *RECIPES])
def test_no_layer_waits_for_the_device(name: str) -> None:
    result = found(name)
    assert result.listed("stops", "forward") == []
    assert result.listed("stops", "backward") == []
    assert {where.split(" ")[0].split(":")[0] for _, where, _ in result.listed("stops", "passes")} <= {
        "lsys/observe/values.py",  # what the step reports, once
        "core/distributed/finalize_model_grads.py",  # Megatron's, once a chunk: whether there were tokens
    }


@pytest.mark.parametrize("name", [*COUNTED, *RECIPES])
def test_streams_are_in_order(name: str) -> None:
    assert found(name).unordered == []


@pytest.mark.parametrize("name", COUNTED)
def test_launches_copies_and_messages_are_those_of_the_table(name: str) -> None:
    """More than docs/benchmarks/gpu-counts.md says is a step back; fewer are told there by its command."""
    assert figures(found(name)) == json.loads(TABLE.read_text())["cases"][name]


@pytest.mark.parametrize("name", RECIPES)
def test_memory_is_as_predicted(name: str) -> None:
    result = found(name)
    assert result.peak == pytest.approx(result.predicted, rel=0.1)


def test_memory_of_each_recipe_and_stage_was_as_predicted() -> None:
    memory = json.loads(TABLE.read_text())["memory"]
    assert memory.keys() == recipe_cases().keys()
    for name, sizes in memory.items():
        assert sizes["symbolic"] == pytest.approx(sizes["predicted"], rel=0.1), name


@pytest.mark.parametrize("name", sorted(set(IN_MIXERS) - {HOST_TENSOR}))
def test_what_waits_in_a_layer_is_told(name: str) -> None:
    result, ordinary = found(name), found("small")
    layers = {str(number) for number in range(1, len(ordinary.layers) + 1)}
    what = "copies" if name == "a pageable copy" else "stops"
    more = {
        part
        for part in result.parts
        if len(result.listed(what, part)) > len(ordinary.listed(what, part)) and part.startswith("forward")
    }
    assert more == {f"forward layer {number} mixer" for number in layers}


def test_a_message_that_is_not_waited_for_is_told() -> None:
    assert found("small").unordered == []
    assert any("messages of group" in fault for fault in found(UNWAITED).unordered)


def test_a_tensor_of_the_host_is_no_argument_of_a_kernel() -> None:
    assert "RuntimeError: scan_kernel: a tensor on cpu is an argument" in str(outcome()[HOST_TENSOR])


@functools.cache
def programs() -> dict[str, list[str]]:
    script = ROOT / "tests" / "support" / "stream_programs.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


RIGHT = (
    "a batch is copied beside",
    "memory goes, and its allocator knows",
    "parts are gathered",
    "a ring's message",
    "a sum that the stream waits for",
    "a result is read once it is there",
    "a copy that the host waits for",
)
WRONG = {
    "the batch is used before it is there": "add on default stream does not wait for _to_copy",
    "the buffer is filled too early": "fill_.Scalar on host does not wait for _to_copy",
    "memory goes while it is written": "what is made in its place on default stream does not wait for fill_",
    "gathered parts are not waited for": "add on default stream does not wait for all_gather",
    "what is gathered is changed": "zero_ on default stream does not wait for all_gather",
    "a result is read too early": "sum.default on host does not wait for copy_",
    "a ring's message is not waited for": "add on default stream does not wait for recv",
}


@pytest.mark.parametrize("name", RIGHT)
def test_programs_in_order(name: str) -> None:
    assert programs()[name] == []


@pytest.mark.parametrize("name", WRONG)
def test_programs_without_order(name: str) -> None:
    assert any(fault.startswith(("aten." + WRONG[name], WRONG[name])) for fault in programs()[name]), programs()[name]


def test_programs_are_all_there() -> None:
    assert programs().keys() == {*RIGHT, *WRONG}
