#!/usr/bin/env bash
# Runs every test: unit, integration (real Redis), and the page in a real browser. Installs what is
# missing, builds once, and leaves no process behind. Arguments go to `cargo test`: a name, or `--test bus` for one
# binary instead of all. A first `--soak SECONDS` says how long faults happen at random (tests/load/soak.rs), two
# minutes unless said. SOAK_SEED=N in the environment repeats those of an earlier run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/sbin # where Debian has nginx

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
systemd systemd-analyze
strace strace
LIST

say "Installing what the examples need"
tests/examples.sh

# The tests run in a process group of their own. Whatever is left of it when they end, or when this script is
# interrupted, is ended with it.
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

# `cargo test` alone leaves out the binaries that need other programs.
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

say "Testing"
cargo test "${targets[@]}" "$@" &
tests=$!
wait "$tests"

if (($# == 0)); then # those named by arguments are cargo's
    say "Testing the WebSocket with Autobahn"
    tests/autobahn.sh &
    tests=$!
    wait "$tests"
fi
say "All tests passed"
