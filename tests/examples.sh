#!/usr/bin/env bash
# Installs what the programs in examples/ need, as their README says, into target/examples. Does
# nothing if it is there.
set -euo pipefail
cd "$(dirname "$0")/.."

home=${CARGO_TARGET_DIR:-target}/examples
mkdir -p "$home/node"

# The lists are copied last: they stand for a complete installation.
if ! cmp -s examples/fastapi/requirements.txt "$home/requirements.txt"; then
    python3 -m venv --clear --without-pip "$home/python"
    python3 -m pip --disable-pip-version-check --python "$home/python/bin/python" \
        install --quiet -r examples/fastapi/requirements.txt
    cp examples/fastapi/requirements.txt "$home/"
fi
if ! cmp -s examples/node/package-lock.json "$home/package-lock.json"; then
    cp examples/node/package.json examples/node/package-lock.json "$home/node/"
    npm ci --silent --prefix "$home/node"
    cp examples/node/package-lock.json "$home/"
fi
