"""launch/run.sh on one node: its words, and that no worker outlives its agent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import is_alive, number

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "run.sh"


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """With no variables of Slurm and CUDA but those given."""
    own = ("SLURM_", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    environment |= {"PYTHON": sys.executable} | variables
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("script", ["run.sh", "lab.sh"])
def test_the_scripts_can_be_read(script: str):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


def test_help():
    done = run("--help")
    assert done.returncode == 0 and "--nodes N" in done.stdout and "set -euo" not in done.stdout
    assert run().returncode == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["c.yaml", "--nodes", "2"], "several nodes need --host"),
        (["c.yaml", "--nodes", "2", "--host", "a"], "several nodes need --job"),
        (["c.yaml", "--port", "x"], "--port takes a number, not 'x'"),
        (["c.yaml", "--port"], "--port takes a number, not ''"),
        (["c.yaml", "--fast"], "--fast is no option"),
        (["c.yaml", "--train.steps"], "--train.steps takes a value"),
        (["c.yaml", "d.yaml"], "'d.yaml' is a second CONFIG"),
        (["c.yaml", "--", "-m", "x"], "no CONFIG before it"),
        (["--nodes", "0", "c.yaml"], "--nodes takes 1 or more"),
    ],
)
def test_words_that_do_not_do(words: list[str], told: str):
    done = run(*words)
    assert done.returncode == 2 and told in done.stderr and "--help" in done.stderr


PYTHON = """#!/bin/sh
if [ "$2" = lsys.launch.network ]; then echo 0 10.0.0.1 eth7 10.0.0.2; else echo "$GLOO_SOCKET_IFNAME" "$@"; fi
"""


def put(folder: Path, **programs: str) -> dict[str, str]:
    """Programs in a folder; the variables with which they are found before the machine's."""
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python")}


SCONTROL = "#!/bin/sh\nprintf 'gpu-1\\ngpu-2\\n'\n"


def test_slurm_says_who_the_nodes_are(tmp_path: Path):
    """With a python and a scontrol that only tell what they are called with."""
    variables = put(tmp_path, python=PYTHON, scontrol=SCONTROL)
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu-[1-2]"}
    done = run("c.yaml", "--ranks", "8", "--train.steps", "3", **variables, **slurm)
    looked, started = done.stdout.splitlines()
    wanted = "--nodes 2 --ranks 8 --host gpu-1 --port 29500 --job slurm-77-0 --interface  --hosts gpu-1,gpu-2 --node 1"
    assert looked.startswith(f" -m lsys.launch.preflight c.yaml --train.steps 3 {wanted} --timeout 120")
    assert started.startswith(
        "eth7 -m torch.distributed.run --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d"
    )
    assert "--rdzv-endpoint 10.0.0.1:29500 --rdzv-id slurm-77-0 --local-addr 10.0.0.2" in started
    assert "is_host=0,join_timeout=300" in started
    assert started.endswith("-m lsys.launch.worker -m lsys train c.yaml --train.steps 3")


def test_a_step_of_slurm_may_have_fewer_nodes_than_the_job(tmp_path: Path):
    variables = put(tmp_path, python=PYTHON, scontrol="#!/bin/sh\nprintf '%s\\nlast\\n' \"$3\"\n")
    slurm = {"SLURM_NNODES": "4", "SLURM_NODEID": "0", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "all"}
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "few", "SLURM_STEP_ID": "3", "SLURM_LOCALID": "0"}
    step["SLURM_STEP_TASKS_PER_NODE"] = "1(x2)"
    done = run("c.yaml", "--ranks", "8", **variables, **slurm, **step)
    assert "--nodes 2 --ranks 8 --host few --port 29500 --job slurm-77-3 --interface  --hosts few,last" in done.stdout


@pytest.mark.parametrize("variables", [{"SLURM_LOCALID": "1"}, {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}], ids=str)
def test_several_tasks_on_a_node_are_refused(variables: dict[str, str]):
    done = run("c.yaml", **variables)
    assert done.returncode == 2 and "start one task per node: srun --ntasks-per-node 1" in done.stderr


NVIDIA_SMI = '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: H100 (UUID: GPU-$i)"; done\n'


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [
        (None, 4),
        ("0,1", 2),
        ("3", 1),
        ("0, 2,-1,3", 2),
        ("GPU-1a2b,GPU-3", 2),
        ("MIG-1a2b,MIG-3c4d,MIG-5e6f,MIG-7a8b,MIG-9c0d", 5),
        ("", 1),  # on the CPU
        ("-1", 1),
    ],
)
def test_a_node_has_as_many_ranks_as_cuda_shows_gpus(tmp_path: Path, visible: str | None, ranks: int):
    variables = put(tmp_path, python=PYTHON, **{"nvidia-smi": NVIDIA_SMI})
    if visible is not None:
        variables["CUDA_VISIBLE_DEVICES"] = visible
    done = run("c.yaml", **variables)
    looked, started = done.stdout.splitlines()
    assert f" --ranks {ranks} " in looked and f" --nproc-per-node {ranks} " in started


def test_a_preflight_that_refuses_starts_nothing(tmp_path: Path):
    (tmp_path / "python").write_text('#!/bin/sh\necho "$2"\nexit 2\n')
    (tmp_path / "python").chmod(0o755)
    done = run("c.yaml", PYTHON=str(tmp_path / "python"))
    assert done.returncode == 2 and done.stdout == "lsys.launch.preflight\n"


WORKER = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(100)
"""


def test_no_worker_outlives_its_agent(tmp_path: Path):
    (tmp_path / "work.py").write_text(WORKER)
    command = [str(SCRIPT), "--ranks", "2", "--no-preflight", "--", str(tmp_path / "work.py"), str(tmp_path)]
    agent = subprocess.Popen(command, env=os.environ | {"PYTHON": sys.executable})
    try:
        workers = [number(tmp_path / f"pid{rank}", seconds=150) for rank in range(2)]
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    end = time.monotonic() + 10
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < end, "workers live on"
        time.sleep(0.05)
