#!/usr/bin/env bash
# Many connections to many nodes with one Redis, on this machine: many_nodes.sh NODES CLIENTS [BINARY]
#
# Starts Redis and the nodes with default settings, loads them by `fanfare bench`, and ends them. A
# node holds at most as many connections as it may have open files. PHASES replaces the phases.
set -euo pipefail
(($# >= 2)) || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
nodes=$1 clients=$2 binary=${3:-target/release/fanfare} port=15000
ulimit -n "$(ulimit -Hn)"

logs=$(mktemp -d) processes=()
finish() {
    kill "${processes[@]}" 2>/dev/null || true
    wait
    rm -rf "$logs"
}
trap finish EXIT

redis-server --bind 127.0.0.1 --port $port --save '' >/dev/null &
redis=$!
processes+=("$redis")
until redis-cli -p $port ping >/dev/null 2>&1; do sleep 0.1; done

urls=()
for ((node = 1; node <= nodes; node++)); do
    "$binary" --redis redis://127.0.0.1:$port --listen 127.0.0.1:$((port + node)) \
        --admin 127.0.0.1:$((port + 1000 + node)) >"$logs/$node" 2>&1 &
    processes+=($!)
    until curl -sf "127.0.0.1:$((port + node))/readyz" >/dev/null; do sleep 0.1; done
    urls+=("ws://127.0.0.1:$((port + node))/ws/{i}")
done

used() { awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo; }
before=$(used)
"$binary" bench "${urls[@]}" --connections "$clients" --connect-rate 8000/s --rate 1/s --publish "redis://127.0.0.1:$port" \
    --command 'FCALL fanfare_publish 1 fanfare:{ws_broadcast} {"text":"{event}"}' \
    --phases "${PHASES:-connect, idle 10s, rate 0.2/s 20s, rate 2/s 20s, storm 10%, idle 1s}" &
bench=$!
processes+=("$bench")
least=$before
while kill -0 "$bench" 2>/dev/null; do
    now=$(used)
    ((now < least)) && least=$now
    sleep 1
done
wait "$bench" || true
echo "memory of the machine: $((before - least)) MiB at most for the connections, both ends and their clients"
grep -E '^(slab|Slab|sock)' /proc/meminfo || true
echo "Redis: $(redis-cli -p $port info cpu | grep -E 'used_cpu_(sys|user):' | tr -d '\r' | tr '\n' ' ')" \
    "$(redis-cli -p $port info memory | grep -E '^used_memory_human' | tr -d '\r')"
