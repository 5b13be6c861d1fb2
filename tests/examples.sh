#!/usr/bin/env bash
# Installs what the programs in examples/ need, as their README says, and the tests of the browser
# client in Node, into target/examples. Does nothing if it is there.
set -euo pipefail
cd "$(dirname "$0")/.."

home=${CARGO_TARGET_DIR:-target}/examples
mkdir -p "$home"

# The lists are copied last: they stand for a complete installation.
lists=(examples/fastapi/requirements.txt examples/inbox/requirements.txt examples/python/requirements.txt)
if ! cat "${lists[@]}" | cmp -s - "$home/requirements.txt"; then
    python3 -m venv --clear --without-pip "$home/python"
    python3 -m pip --disable-pip-version-check --python "$home/python/bin/python" \
        install --quiet "${lists[@]/#/--requirement=}"
    cat "${lists[@]}" >"$home/requirements.txt"
fi
for packages in examples/node tests/page/client; do
    into=$home/${packages##*/}
    if ! cmp -s $packages/package-lock.json "$into/installed.json"; then
        mkdir -p "$into"
        cp $packages/package.json $packages/package-lock.json "$into/"
        npm ci --silent --prefix "$into"
        cp $packages/package-lock.json "$into/installed.json"
    fi
done
