#!/usr/bin/env bash
# How many connections fit into a memory cgroup, kernel memory of their sockets included, with
# traffic: small_machine.sh MIB NODES CLIENTS [BINARY]
#
# Starts a Redis and the clients outside of a new cgroup with this limit, and NODES nodes with
# default settings in it: one process holds at most as many sockets as it may have open files. More
# clients than fit are tried: "refused" is how many got 503. Needs root, and cgroups of version 1 or 2.
set -euo pipefail
(($# >= 3)) || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mib=$1 nodes=$2 clients=$3 binary=${4:-target/release/fanfare}
port=17000
ulimit -n "$(ulimit -Hn)"

if [[ -d /sys/fs/cgroup/memory ]]; then
    group=/sys/fs/cgroup/memory/fanfare-bench-$$ limit=memory.limit_in_bytes
    usage=memory.usage_in_bytes most=memory.max_usage_in_bytes kills=memory.oom_control
else
    group=/sys/fs/cgroup/fanfare-bench-$$ limit=memory.max
    usage=memory.current most=memory.peak kills=memory.events
fi
mkdir "$group"
echo $((mib << 20)) >"$group/$limit"

logs=$(mktemp -d) processes=()
finish() {
    kill "${processes[@]}" 2>/dev/null || true
    wait
    rm -rf "$logs"
    rmdir "$group"
}
trap finish EXIT

redis-server --bind 127.0.0.1 --port $port --save '' >/dev/null &
processes+=($!)
until redis-cli -p $port ping >/dev/null 2>&1; do sleep 0.1; done

urls=()
for ((node = 1; node <= nodes; node++)); do
    # The shell moves itself into the cgroup, and becomes the node.
    sh -c 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"' sh "$group" "$binary" --redis redis://127.0.0.1:$port \
        --listen 127.0.0.1:$((port + node)) --admin 127.0.0.1:$((port + 1000 + node)) >"$logs/$node" 2>&1 &
    processes+=($!)
    until curl -sf "127.0.0.1:$((port + node))/readyz" >/dev/null; do sleep 0.1; done
    urls+=("ws://127.0.0.1:$((port + node))/ws/{i}")
done

"$binary" bench "${urls[@]}" --connections "$clients" --publish "redis://127.0.0.1:$port" \
    --command 'FCALL fanfare_publish 1 fanfare:{ws_broadcast} {"text":"{event}"}' \
    --phases "${PHASES:-connect, idle 5s, rate 10/s 10s, saturate 64 10s, stall 10% 10s, storm 10%}" || true
printf 'cgroup: %s MiB now, %s MiB at most, %s\n' $(($(cat "$group/$usage") >> 20)) \
    $(($(cat "$group/$most") >> 20)) "$(grep -E 'oom_kill ' "$group/$kills")"
grep -h 'memory is short' "$logs"/* | head -n 2 || true
