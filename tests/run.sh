#!/usr/bin/env bash
# Runs every test: unit, integration (real Redis), and the page in a real browser. Installs with apt what is
# missing, builds once, and leaves no process behind. Arguments go to `cargo test`.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; }

# Package and the program that it brings.
missing=()
while read -r package program; do
    command -v "$program" >/dev/null || missing+=("$package")
done <<'LIST'
redis-server redis-server
chromium chromium
chromium-driver chromedriver
LIST

if ((${#missing[@]})); then
    say "Installing ${missing[*]}"
    as_root=()
    if ((EUID != 0)); then
        as_root=(sudo)
    fi
    install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends)
    # Package lists may be missing or old; then they are fetched and it is tried again.
    "${install[@]}" "${missing[@]}" || { "${as_root[@]}" apt-get update && "${install[@]}" "${missing[@]}"; }
fi

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

say "Building"
cargo test --no-run "$@" &
tests=$!
wait "$tests"

say "Testing"
cargo test "$@" &
tests=$!
wait "$tests"
say "All tests passed"
