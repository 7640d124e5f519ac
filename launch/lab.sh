#!/usr/bin/env bash
# A cluster on one machine: network namespaces as nodes, joined by a bridge in a namespace of its own.
#
#   lab.sh up NODES [RATE]            make the nodes; RATE as below, none if left out
#   lab.sh rate RATE [NODE]           what every node, or one, may send by its interface: 1gbit, 100mbit; none: unshaped
#   lab.sh run NODE COMMAND...        a command on node 0, 1, ...
#   lab.sh torchrun LOGS ARGUMENTS... torchrun on every node, waited for; output in LOGS/nodeN.log; RANKS per node (1)
#   lab.sh launch LOGS ARGUMENTS...   launch/run.sh on every node, likewise
#   lab.sh bytes                      a line per node: its number, bytes sent, bytes received, by its interface
#   lab.sh down                       end what still runs on the nodes, and remove them
#
# Nodes have the addresses NET.1, NET.2, ... on eth0 (variables LAB, a prefix of names, NET and MTU). No address, route or
# firewall rule changes outside these namespaces, so that nothing in them reaches another machine. Linux, root, iproute2.
set -Eeuo pipefail

LAB=${LAB:-lsys-lab}
NET=${NET:-10.91.0}
MTU=${MTU:-9000}  # jumbo frames, as clusters have: each packet costs CPU time of the cores that compute
SWITCH=$LAB-switch
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "lab.sh: $*" >&2; exit 1; }

# All nodes' numbers, ascending.
nodes() { ip netns list | sed -n "s/^$LAB-\([0-9]\+\)\( .*\)\{0,1\}$/\1/p" | sort -n; }

on() { ip netns exec "$LAB-$1" "${@:2}"; }

check() {
    command -v ip >/dev/null && command -v tc >/dev/null || fail "needs the commands ip and tc: install iproute2"
    [[ $(id -u) == 0 ]] || fail "network namespaces need root; start it with sudo"
}

up() {
    local count=${1:-} rate=${2:-none} node
    [[ $count =~ ^[1-9][0-9]?$ ]] || fail "up takes the number of nodes, 1 to 99, and a rate; got '$*'"
    [[ -z $(ip netns list | grep "^$SWITCH\b") ]] || fail "the lab $LAB is up already; lab.sh down removes it"
    burst "$rate" >/dev/null  # refuses a rate that it cannot read before anything is made
    trap 'echo "lab.sh: this machine makes no network namespaces, or a step of up failed; removed again" >&2; down' ERR
    ip netns add "$SWITCH"
    ip -n "$SWITCH" link add bridge type bridge
    ip -n "$SWITCH" link set bridge up
    for ((node = 0; node < count; node++)); do
        ip netns add "$LAB-$node"
        on "$node" sh -c 'echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6' 2>/dev/null || true  # IPv6 talks unasked
        ip link add eth0 mtu "$MTU" netns "$LAB-$node" type veth peer name "port$node" mtu "$MTU" netns "$SWITCH"
        ip -n "$SWITCH" link set "port$node" master bridge up
        ip -n "$LAB-$node" address add "$NET.$((node + 1))/24" dev eth0
        ip -n "$LAB-$node" link set lo up
        ip -n "$LAB-$node" link set eth0 up
    done
    rate "$rate"
    trap - ERR
}

# Bytes that pass at once after a pause: what passes in 1 ms, but a few packets at least. 0: unshaped.
burst() {
    local number=${1%%[a-z]*} bytes
    case ${1##*[0-9]} in
        kbit) bytes=$((number / 8)) ;;
        mbit) bytes=$((number * 1000 / 8)) ;;
        gbit) bytes=$((number * 1000000 / 8)) ;;
        none) echo 0; return ;;
        *) fail "a rate is a whole number of kbit, mbit or gbit, as 100mbit, or none; got '$1'" ;;
    esac
    echo $((bytes > 16384 ? bytes : 16384))
}

rate() {
    local rate=${1:-} bucket node
    bucket=$(burst "$rate")
    [[ -z ${2:-} ]] || nodes | grep -qx "$2" || fail "there is no node '$2'"
    for node in ${2:-$(nodes)}; do
        tc -n "$LAB-$node" qdisc delete dev eth0 root 2>/dev/null || true
        [[ $bucket == 0 ]] ||
            tc -n "$LAB-$node" qdisc add dev eth0 root tbf rate "$rate" burst "$bucket" latency 50ms
    done
}

bytes() {
    local node
    for node in $(nodes); do
        echo "$node $(on "$node" sed -n 's/^ *eth0: *//p' /proc/net/dev | awk '{print $9, $1}')"
    done
}

# All namespaces share the host's name: without is_host every agent of torchrun takes itself for the rendezvous host.
agent() {
    export GLOO_SOCKET_IFNAME=eth0 TP_SOCKET_IFNAME=eth0 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    exec ip netns exec "$LAB-$1" "${TORCHRUN:-torchrun}" --nnodes "$count" --nproc-per-node "${RANKS:-1}" \
        --rdzv-backend c10d --rdzv-endpoint "$NET.1:${PORT:-29500}" --rdzv-id "$LAB" \
        --rdzv-conf "is_host=$(($1 == 0))" --local-addr "$NET.$(($1 + 1))" "${@:2}"
}

launcher() {
    exec ip netns exec "$LAB-$1" bash "$HERE/run.sh" --nodes "$count" --node "$1" --ranks "${RANKS:-1}" --host "$NET.1" \
        --port "${PORT:-29500}" --job "$LAB" --interface eth0 "${@:2}"
}

# A command on every node at once, waited for; SIGTERM and SIGINT go on to them. The code is that of one that failed, if any did.
everywhere() {
    local command=$1 logs=${2:-} node pid one code=0 count
    [[ -n $logs && $# -ge 3 ]] || fail "takes a folder for logs and arguments"
    count=$(nodes | wc -l)
    [[ $count -gt 0 ]] || fail "no nodes; lab.sh up makes them"
    mkdir -p "$logs"
    started=()
    trap 'kill -TERM "${started[@]}" 2>/dev/null || true' TERM INT
    for node in $(nodes); do
        "$command" "$node" "${@:3}" >"$logs/node$node.log" 2>&1 &
        started+=($!)
    done
    for pid in "${started[@]}"; do
        one=0
        wait "$pid" || one=$?
        while kill -0 "$pid" 2>/dev/null; do one=0; wait "$pid" || one=$?; done  # a signal ended the wait, not the process
        [[ $one == 0 ]] || code=$one
    done
    return "$code"
}

# Only what runs inside the lab's own namespaces is ended, each process by its id.
down() {
    local space pid
    for space in $(nodes | sed "s/^/$LAB-/") "$SWITCH"; do
        for pid in $(ip netns pids "$space" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null || true; done
        ip netns delete "$space" 2>/dev/null || true
    done
}

case ${1:-} in
    up | rate | bytes | down) check; "$@" ;;
    run) check; [[ $# -ge 3 ]] || fail "run takes a node and a command"; on "${@:2}" ;;
    torchrun) check; everywhere agent "${@:2}" ;;
    launch) check; everywhere launcher "${@:2}" ;;
    *) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0" | head -n 9; exit 2 ;;
esac
