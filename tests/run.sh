#!/usr/bin/env bash
# Runs all tests, with a real Redis, nginx and browser. Installs missing programs, builds once, and
# leaves no process behind. Arguments go to `cargo test`: a name, or `--test bus` for one binary
# instead of all. A first `--soak SECONDS` sets how long random faults are injected
# (tests/load/soak.rs, two minutes by default). SOAK_SEED=N in the environment repeats the faults of
# an earlier run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin # for nginx on Debian

export SOAK_SECONDS=${SOAK_SECONDS:-120}
if [[ ${1:-} == --soak ]]; then
    SOAK_SECONDS=${2:-}
    if ! [[ $SOAK_SECONDS =~ ^[0-9]+$ ]]; then
        echo "--soak needs a number of seconds, as in: tests/run.sh --soak 3600" >&2
        exit 2
    fi
    shift 2
fi

say() { printf '\n== %s\n' "$*"; }

tests/install.sh <<'LIST'
redis-server redis-server
chromium chromium
chromium-driver chromedriver
prometheus promtool
openssl openssl
python3 python3
python3-pip pip3
nodejs node
npm npm
nginx nginx
haproxy haproxy
curl curl
systemd systemd-analyze
strace strace
LIST

say "Installing what the examples need"
tests/examples.sh

# The tests run in their own process group, which is killed when they have ended or this script is
# interrupted.
set -m
tests=
finish() {
    if [[ -n $tests ]]; then
        kill -KILL -- "-$tests" 2>/dev/null || true
    fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# `cargo test` alone skips the binaries that need other programs.
targets=(--lib --bins --test '*')
for argument; do
    case $argument in
    --) break ;;
    --lib | --bin | --bin=* | --bins | --test | --test=* | --tests | --example* | --doc | --all-targets) targets=() ;;
    esac
done

say "Building"
cargo test --no-run "${targets[@]}" "$@" &
tests=$!
wait "$tests"

say "Testing, with $("${REDIS_SERVER:-redis-server}" --version)"
cargo test "${targets[@]}" "$@" &
tests=$!
wait "$tests"

if (($# == 0)); then # arguments select tests of cargo
    tests/redis_servers.sh &
    tests=$!
    wait "$tests"

    say "Testing the WebSocket with Autobahn"
    tests/autobahn.sh &
    tests=$!
    wait "$tests"
fi
say "All tests passed"
