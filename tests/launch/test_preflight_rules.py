"""What the preflight finds wrong in reports of nodes: each kind of mismatch names the right host."""

import copy
import os
from dataclasses import replace
from typing import Any

import pytest
from support.texts import make, write

from lsys.launch.preflight import facts
from lsys.launch.preflight.judge import judge, missing_nodes, summary
from lsys.launch.preflight.rendezvous import Meeting, rounds
from lsys.launch.preflight.report import Report

GIB = 1 << 30


def nodes(count: int = 3) -> list[Report]:
    """Reports in which nothing is wrong."""
    made = []
    for index in range(count):
        others = [str(other) for other in range(count) if other != index]
        made.append(
            Report(
                name=f"gpu-{index}",
                address=f"10.0.0.{index + 1}",
                interface="eth0",
                index=index,
                nodes=count,
                ranks=2,
                versions={"python": "3.11.7", "torch": "2.13.0", "lsys": "0.1.0"},
                code="aa",
                config={"optimizer.lr": 0.001, "checkpoint.keep": 2},
                files={"data/a.bin": 100},
                checkpoint=GIB,
                gpus=["H100 81559 MiB"] * 2,
                driver="550.1",
                shm=GIB,
                descriptors=1 << 20,
                uncertainty=0.001,
                folder="/runs/a",
                free=10 * GIB,
                reach=dict.fromkeys(others, 0.0001),
                rates=dict.fromkeys(others, 1e9),
            )
        )
    return made


def found(reports: list[Report], **kwargs) -> list[str]:
    return [str(finding) for finding in judge(Meeting(reports, **kwargs), reports[0].nodes)]


def test_nothing_is_wrong():
    assert found(nodes()) == [] and found(nodes(1)) == []
    text = summary(Meeting(nodes(), seconds=1.25), 3)
    assert text == "3 of 3 nodes x 2 ranks; clocks within 0.0 ms; round trips 0.10 ms; one stream 1,000 MB/s; 1.2 s"


ONE_NODE = [
    ({"versions": {"python": "3.11.7", "torch": "2.12.0", "lsys": "0.1.0"}}, "torch 2.12.0, on 2 other nodes 2.13.0; install the same"),
    ({"versions": {"python": "3.11.7", "lsys": "0.1.0"}}, "torch none, on 2 other nodes 2.13.0; install the same"),
    ({"code": "bb"}, "lsys's source has the digest bb, on 2 other nodes aa; update the checkout"),
    ({"driver": "535.2"}, "GPU driver 535.2, on 2 other nodes 550.1; install the same"),
    ({"gpus": ["H100 81559 MiB"]}, "GPUs: 1 x H100 81559 MiB, on 2 other nodes 2 x H100 81559 MiB; take the node out"),
    ({"gpus": ["H100 81559 MiB"]}, "1 GPUs for 2 ranks; each rank needs its own; --ranks 1"),
    ({"config": {"optimizer.lr": 0.002, "checkpoint.keep": 2}}, "optimizer.lr is 0.002, on 2 other nodes 0.001; every node must read"),
    ({"config": {}, "mistakes": ["nope.yaml cannot be read: No such file; name a YAML file"]}, "nope.yaml cannot be read: No such file; name a YAML"),
    ({"files": {"data/a.bin": -1}}, "data/a.bin not found; copy it there"),
    ({"files": {"data/a.bin": 99}}, "data/a.bin has 99 bytes, on 2 other nodes 100 bytes; copy it anew"),
    ({"ranks": 1}, "ranks 1, on 2 other nodes 2; give every node the same --ranks"),
    ({"nodes": 4}, "nodes 4, on 2 other nodes 3; give every node the same --nodes"),
    ({"shm": 64 << 20}, "/dev/shm has 64 MiB free; 2 ranks need 320 MiB; start the container with"),
    ({"descriptors": 256}, "256 open files are allowed; 6 ranks need 608; raise the limit: ulimit -n 608"),
    ({"offset": -5.0}, "its clock is 5.0 s behind the others; at most 2 s do; synchronise it"),
    ({"offset": 3.5}, "its clock is 3.5 s ahead of the others"),
    ({"marker": False}, "train.folder /runs/a is not the storage that gpu-0 sees there; mount the same storage"),
    ({"error": "not writable"}, "train.folder /runs/a: not writable; make it, or let this user write there"),
    ({"rates": {"0": "no answer in 30 s", "2": 1e9}}, "could not send to gpu-0: no answer in 30 s; look at"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "told"), ONE_NODE)
def test_the_node_at_fault_is_named(fault: dict, told: str):
    reports = nodes()
    reports[1] = replace(reports[1], **fault)
    all_found = found(reports)
    about = [each for each in all_found if told in each]
    assert about and all(each.startswith("gpu-1: ") for each in all_found), all_found


def test_of_two_that_differ_the_hosts_is_usual():
    reports = nodes(2)
    reports[0].config = {"optimizer.lr": 0.5, "checkpoint.keep": 2}
    assert found(reports) == [
        "gpu-1: optimizer.lr is 0.001, on gpu-0 0.5; every node must read the same configuration: "
        "copy the file, and give each the same options"
    ]


def test_what_all_have_is_told_once():
    reports = nodes()
    for report in reports:
        report.mistakes = ["train.steps: 0 does not do; 1 or more"]
        report.files = {"data/a.bin": -1}
    assert found(reports) == [
        "all nodes: train.steps: 0 does not do; 1 or more",
        "all nodes: data/a.bin not found; copy it there, or mount the storage that has it",
    ]


def test_clocks_are_held_against_the_median():
    reports = nodes()
    for report in reports[1:]:
        report.offset = 60.0  # the host's own clock is the wrong one
    assert [each.split(":")[0] for each in found(reports)] == ["gpu-0"]


def test_an_uncertain_clock_is_not_accused():
    reports = nodes()
    reports[2] = replace(reports[2], offset=2.5, uncertainty=1.0)
    assert found(reports) == []


def test_full_storage():
    reports = nodes()
    reports[0].free = GIB
    assert "1.0 GiB free in train.folder /runs/a; its checkpoints take 3.0 GiB more" in found(reports)[0]
    reports[0].kept = 2  # the third is written before the first goes
    assert found(reports) == []


def test_a_pair_that_does_not_reach_each_other():
    reports = nodes()
    reports[1].reach["2"] = "No route to host"
    assert found(reports) == [
        "gpu-1: does not reach gpu-2 (10.0.0.3): No route to host; the other way works; "
        "look at the routes and firewalls of both; the job needs all ports between its nodes"
    ]
    reports[2].reach["1"] = "no answer in 3 s"
    assert [each.split(":")[0] for each in found(reports)] == ["gpu-1", "gpu-2"]


def test_a_node_that_is_cut_off():
    reports = nodes(4)
    for other in (0, 1, 3):
        reports[other].reach["2"] = "no answer in 3 s"
    told = found(reports)
    assert len(told) == 1 and told[0].startswith("gpu-2: no connection from any other node: no answer in 3 s")
    for other in (0, 1, 3):
        reports[2].reach[str(other)] = "no answer in 3 s"
    told = found(reports)
    assert len(told) == 1 and told[0].startswith("gpu-2: no connection to and from any other node")


def test_a_slow_link_is_a_warning():
    reports = nodes()
    reports[2].rates = {"0": 1.2e7, "1": 1.1e7}
    (finding,) = judge(Meeting(reports), 3)
    assert finding.warning and finding.hosts == ("gpu-2",)
    assert "sends at 12 MB/s at best, the other nodes at 1,000" in finding.problem
    for rate, told in ((4.9e8, 1), (5.1e8, 0)):  # half of what the others reach does
        reports[2].rates = {"0": rate, "1": 1.1e7}
        assert len(judge(Meeting(reports), 3)) == told, rate


def test_a_node_that_sent_to_nobody_is_not_called_slow():
    reports = nodes()
    reports[2].rates = {"0": "no answer in 30 s", "1": "no answer in 30 s"}
    assert not [text for text in found(reports) if "MB/s at best" in text]
    assert len([text for text in found(reports) if "could not send to" in text]) == 2


def test_missing_nodes_are_named_where_that_can_be_known():
    reports = nodes(4)[:3]
    assert missing_nodes(reports, 4) == ["node 3"]
    assert missing_nodes(reports, 4, ["gpu-0", "10.0.0.2", "gpu-2.cluster", "gpu-9"]) == ["gpu-9"]
    assert found(reports)[0].startswith("node 3: did not come (3 of 4 nodes came: gpu-0, gpu-1, gpu-2)")
    nameless = [replace(report, index=-1) for report in reports]
    assert missing_nodes(nameless, 4) == []
    told = found(nameless, strangers=["10.0.0.9"])
    assert told[0].startswith("1 unknown: did not come") and "10.0.0.9 came with another job id" in told[0]


def test_who_leaves_is_named():
    assert (
        "gpu-1: left during the preflight: the connection ended"
        in found(nodes(), lost=[("10.0.0.2", "the connection ended")])[0]
    )


def test_the_same_number_twice():
    reports = nodes()
    reports[2].index = 1
    assert "gpu-1, gpu-2: 2 nodes call themselves node 1" in found(reports)[0]


def test_nodes_that_share_a_name_are_told_by_address():
    reports = [replace(report, name="box") for report in nodes()]
    reports[1].driver = "1"
    assert found(reports)[0].startswith("box/10.0.0.2: GPU driver 1")


@pytest.mark.parametrize("count", range(1, 10))
def test_rounds_hold_each_pair_once_and_nobody_twice_in_a_round(count: int):
    made = rounds(count)
    pairs = [pair for each in made for pair in each]
    assert sorted(pairs) == [(i, j) for i in range(count) for j in range(i + 1, count)]
    for each in made:
        busy = [node for pair in each for node in pair]
        assert len(busy) == len(set(busy))


def test_reports_of_others_are_checked():
    told = nodes()[0].told()
    assert Report.heard(copy.deepcopy(told)) == nodes()[0]
    others: list[Any] = [
        {},
        [],
        told | {"more": 1},
        told | {"reach": []},
        told | {"ranks": "2"},
        told | {"address": "me"},
    ]
    for broken in others:
        with pytest.raises(ValueError):
            Report.heard(broken)


NVIDIA_SMI = """#!/bin/sh
[ "$1" = --query-gpu=index,uuid,name,memory.total,driver_version ] || exit 1
echo '0, GPU-aa11-0, H100, 81559 MiB, 550.1'
echo '1, GPU-bb22-1, A100, 40960 MiB, 550.1'
echo '10, GPU-cc33-2, L4, 23034 MiB, 550.1'
"""
H100, A100, L4 = "H100 81559 MiB", "A100 40960 MiB", "L4 23034 MiB"


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        (None, [H100, A100, L4]),
        ("1,0", [A100, H100]),
        ("10", [L4]),
        ("0, -1, 1", [H100]),
        ("0,7,1", [H100]),
        ("GPU-bb,GPU-cc33-2,GPU-zz", [A100, L4]),
        ("MIG-1,MIG-2", ["H100 MIG"] * 2),
        ("", []),
        ("-1", []),
    ],
)
def test_the_gpus_that_cuda_shows(tmp_path, monkeypatch, visible: str | None, gpus: list[str]):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert facts.gpus() == (gpus, "550.1")


def test_facts_of_this_machine(tmp_path):
    report = Report("here", "127.0.0.1")
    facts.gather(report, "", [])
    assert report.versions["lsys"] and report.versions["torch"] and report.shm > 0 and len(report.code) == 12
    assert facts.flat({"a": {"b": [1, {"c": None}]}}) == {"a.b.0": 1, "a.b.1.c": None}
    report.folder = str(tmp_path)
    (tmp_path / "there").touch()
    facts.look_at_folder(report, "there")
    assert report.marker and not report.error and report.free > 0
    facts.look_at_folder(report, "elsewhere")
    assert not report.marker


def test_a_corpus_that_is_not_what_its_header_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text " * 40)
    make(tmp_path / "c", tmp_path / "a.txt")
    config = "model: {layers: 1, hidden: 8, heads: 1, vocab: 257}\ndata: {corpora: [{path: c}]}\n"
    write(
        tmp_path / "run.yaml", f"{config}train: {{folder: run, steps: 9, batch_tokens: 64, micro_batch_tokens: 64}}\n"
    )
    whole, cut = Report("a", "10.0.0.1"), Report("b", "10.0.0.2")
    facts.gather(whole, "run.yaml", [])
    os.truncate("c.bin", 100)
    facts.gather(cut, "run.yaml", [])
    os.unlink("c.bin")
    gone = Report("c", "10.0.0.3")
    facts.gather(gone, "run.yaml", [])
    assert (whole.mistakes, gone.mistakes) == ([], []) and gone.files["c.bin"] == -1
    assert [mistake.split(":")[1] for mistake in cut.mistakes] == [" c.bin has 100 bytes, its index says 402"]


def test_nobody_looks_for_checkpoints_before_the_host_has_written(tmp_path, monkeypatch):
    """A network file system would remember for half a minute that the folder was missing."""
    from lsys.checkpoint import choice

    monkeypatch.chdir(tmp_path)
    config = "model: {layers: 1, hidden: 8, heads: 1, vocab: 257}\ndata: {corpora: [{path: c}]}\ncheckpoint: {resume: nowhere}\n"
    write(
        tmp_path / "run.yaml", f"{config}train: {{folder: run, steps: 9, batch_tokens: 64, micro_batch_tokens: 64}}\n"
    )
    report = Report("a", "10.0.0.1")
    with monkeypatch.context() as patch:
        patch.setattr(choice, "plan", lambda *_: pytest.fail("the folder was looked into"))
        settings = facts.gather(report, "run.yaml", [])
    assert report.mistakes == []
    facts.look_at_checkpoints(report, settings)
    assert [mistake.partition(":")[0] for mistake in report.mistakes] == ["checkpoint.resume"]
