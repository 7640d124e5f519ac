#!/usr/bin/env bash
# Start a run on one node or on several: the same command on each, once per node.
#
#   launch/run.sh [OPTIONS] CONFIG [--section.key VALUE ...]    lsys train CONFIG ...
#   launch/run.sh [OPTIONS] -- -m MODULE ARGUMENTS              any module or script that torchrun starts
#
#   --nodes N         how many nodes                                           (Slurm's, else 1)
#   --ranks R         ranks of a node                                          (its GPUs, of CUDA_VISIBLE_DEVICES if set, else 1)
#   --host NAME       the node where the others meet: a name or IPv4 address   (Slurm's first; needed for several nodes)
#   --port P          a free port there                                        (29500)
#   --job ID          the same on all nodes, another for each job, known to nobody else:  openssl rand -hex 8
#                                                                              (Slurm's; needed for several nodes)
#   --interface IF    the network interface of the job                         (the one that leads to the host)
#   --hosts A,B,...   all nodes, so that those that do not come can be named   (Slurm's)
#   --node I          the number of this node, for the same purpose            (Slurm's)
#   --restarts N      how often workers are started anew after one has failed  (3)
#   --join SECONDS    how long nodes wait for each other                       (300; the preflight 120)
#   --no-preflight    do not look at the nodes first: for a node that takes the place of a lost one
#   --preflight-only  look at the nodes, and start nothing
#
# Under Slurm:  srun --ntasks-per-node 1 launch/run.sh CONFIG.  Other options of torchrun are variables: PET_LOG_DIR, PET_TEE.
# docs/launch.md tells more.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

fail() { echo "run.sh: $*; run.sh --help lists the options" >&2; exit 2; }

# The interpreter: PYTHON, that of the environment in use, or of the checkout.
interpreter() {
    if [[ -n ${PYTHON:-} ]]; then echo "$PYTHON"
    elif [[ -z ${VIRTUAL_ENV:-} && -x $ROOT/.venv/bin/python ]]; then echo "$ROOT/.venv/bin/python"
    else command -v python3 || fail "no python3; set PYTHON"
    fi
}

slurm() {
    # Each task would start as many ranks as there are GPUs.
    [[ ${SLURM_LOCALID:-0} == 0 && ${SLURM_STEP_TASKS_PER_NODE:-1} =~ ^1(\(x[0-9]+\))?$ ]] ||
        fail "several tasks on a node; start one task per node: srun --ntasks-per-node 1"
    local list=${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}  # the step's: srun may take fewer nodes than the job has
    nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
    node=${SLURM_NODEID:--1}
    job=${SLURM_JOB_ID:+slurm-$SLURM_JOB_ID-${SLURM_STEP_ID:-0}}
    if [[ -n $list ]] && command -v scontrol >/dev/null; then
        hosts=$(scontrol show hostnames "$list" | paste -sd,)
        host=${hosts%%,*}
    fi
}

# Options may come before and after CONFIG; --section.key VALUE goes to lsys train.
arguments() {
    local words=()
    while (($#)); do
        case $1 in
            -h | --help) usage; exit 0 ;;
            --no-preflight) preflight=no; shift ;;
            --preflight-only) preflight=only; shift ;;
            --nodes | --ranks | --port | --restarts | --join)
                [[ ${2:-} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$1 takes a number, not '${2:-}'"
                printf -v "${1#--}" %s "$2"
                shift 2 ;;
            --host | --job | --interface | --hosts | --node)
                [[ $# -ge 2 ]] || fail "$1 takes a value"
                printf -v "${1#--}" %s "$2"
                shift 2 ;;
            --)
                [[ $# -ge 2 && ${#words[@]} == 0 && ${#config[@]} == 0 ]] || fail "-- takes a program, and no CONFIG before it"
                program=("${@:2}")
                return ;;
            --debug) debug=(--debug); shift ;;
            --*.*=*) words+=("$1"); shift ;;
            --*.*)
                [[ $# -ge 2 ]] || fail "$1 takes a value"
                words+=("$1" "$2")
                shift 2 ;;
            -*) fail "$1 is no option" ;;
            *)
                [[ ${#config[@]} == 0 ]] || fail "'$1' is a second CONFIG"
                config=("$1")
                shift ;;
        esac
    done
    [[ ${#config[@]} == 1 ]] || { usage >&2; exit 2; }
    config+=(${words[@]+"${words[@]}"})
    program=(-m lsys train "${config[@]}" ${debug[@]+"${debug[@]}"})
}

# Those that CUDA shows to the ranks: of CUDA_VISIBLE_DEVICES, it takes what comes before the first that names no device, as -1.
gpus() {
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
        return
    fi
    local count=0 rest=${CUDA_VISIBLE_DEVICES// /},
    while [[ $rest =~ ^([0-9]+|(GPU|MIG)-[^,]+),(.*)$ ]]; do
        count=$((count + 1)) rest=${BASH_REMATCH[3]}
    done
    echo "$count"
}

host='' hosts='' job='' interface='' port=29500 ranks='' restarts=3 join=300 preflight=first config=() program=() debug=()
nodes=1 node=-1
slurm
arguments "$@"
PYTHON=$(interpreter)
ranks=${ranks:-$(gpus)}
[[ ${ranks:-0} -gt 0 ]] || ranks=1
[[ $nodes -ge 1 ]] || fail "--nodes takes 1 or more"
if [[ $nodes -gt 1 ]]; then
    [[ -n $host ]] || fail "several nodes need --host, the node where they meet"
    [[ -n $job ]] || fail "several nodes need --job, an id that is the same on all, such as $(od -An -N8 -tx8 /dev/urandom | tr -d ' ')"
else
    host=127.0.0.1 port=0 interface=''
fi

ulimit -n "$(ulimit -Hn)" 2>/dev/null || true  # gloo and NCCL hold a socket for each peer of each group
export PYTHONSAFEPATH=1
if [[ $preflight != no ]]; then
    "$PYTHON" -m lsys.launch.preflight ${config[@]+"${config[@]}"} --nodes "$nodes" --ranks "$ranks" --host "$host" \
        --port "$port" --job "$job" --interface "$interface" --hosts "$hosts" --node "$node" --timeout "$((join < 120 ? join : 120))"
    [[ $preflight != only ]] || exit 0
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Without it, workers that are started again meet under the addresses of those before them, and never find each other.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export LSYS_AGENT=$$  # torchrun keeps this process's id; see worker.py
torchrun=("$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "$restarts")
if [[ $nodes -gt 1 ]]; then
    place=$("$PYTHON" -m lsys.launch.network "$host" "$interface")
    read -r is_host there device address <<<"$place"
    if [[ $device != - ]]; then  # whatever a node's name resolves to, its peers use the job's interface
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$device} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$device}
        export TP_SOCKET_IFNAME=${TP_SOCKET_IFNAME:-$device}
    fi
    torchrun+=(--rdzv-backend c10d --rdzv-endpoint "$there:$port" --rdzv-id "$job" --local-addr "$address")
    torchrun+=(--rdzv-conf "is_host=$is_host,join_timeout=$join,read_timeout=60")
else
    torchrun+=(--standalone)
fi
exec "${torchrun[@]}" -m lsys.launch.worker "${program[@]}"
