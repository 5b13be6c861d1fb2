#!/usr/bin/env bash
# Runs cases 1 to 10 of the Autobahn test suite against fanfare's connection code
# (tests/autobahn/echo.rs). None may fail, in behaviour or in closing. (Cases 12 and 13 test
# compression, which is not negotiated.) The suite needs Python 2.7; without it nothing is tested.
# Its environment is created once, in target/autobahn.
set -euo pipefail
cd "$(dirname "$0")/.."

home=target/autobahn
# The last versions that work together on Python 2.7.
pins=(autobahn==0.10.9 txaio==2.1.0 Twisted==19.10.0 zope.interface==4.6.0 jinja2==2.11.3 markupsafe==1.1.1
    pyOpenSSL==19.1.0 cryptography==3.3.2 service_identity==18.1.0 six==1.16.0 incremental==16.10.1 unittest2==1.1.0)
alone=(autobahntestsuite==25.10.1 wsaccel==0.6.2) # the dependencies that they declare do not work

# The first Python 2.7 that runs: pyenv has shims for versions that are not selected as well.
find_python() {
    local python
    for python in python2.7 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/2.7*/bin/python2.7; do
        if "$python" -c 'import pip' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}

wanted="${pins[*]} ${alone[*]}"
if [[ $(cat "$home/made" 2>/dev/null) != "$wanted" ]]; then
    python=$(find_python)
    if [[ -z $python ]]; then
        printf '\n!! %s\n' 'NOT TESTED: the Autobahn suite needs Python 2.7 with pip, and there is none (pyenv install 2.7.18)'
        exit 0
    fi
    echo "Creating an environment for the Autobahn suite in $home"
    rm -rf "$home"
    mkdir -p "$home"
    pip=(-m pip --disable-pip-version-check --quiet)
    export PYTHONWARNINGS=ignore
    "$python" "${pip[@]}" install --target "$home/virtualenv" virtualenv==20.15.1
    PYTHONPATH=$home/virtualenv "$python" -m virtualenv --quiet "$home/venv"
    "$home/venv/bin/python" "${pip[@]}" install "${pins[@]}"
    "$home/venv/bin/python" "${pip[@]}" install --no-deps "${alone[@]}"
    echo "$wanted" >"$home/made"
fi

cargo build --quiet --example echo
rm -rf "$home/run"
mkdir "$home/run"
mkfifo "$home/run/port"
"${CARGO_TARGET_DIR:-target}/debug/examples/echo" >"$home/run/port" &
running=($!)
trap 'kill "${running[@]}" 2>/dev/null || true' EXIT
read -r port <"$home/run/port"

# Runs the cases of each argument ("1.* 2.*") in a separate process with its own channel, all at
# once. Their exit codes are meaningless: the results are in the reports.
run() {
    local suites=() cases
    for cases; do
        local name=${#running[@]}
        cat >"$home/run/$name.json" <<JSON
{
    "outdir": "$home/run/$name",
    "servers": [{"agent": "fanfare", "url": "ws://127.0.0.1:$port/ws/autobahn?channel=part$name"}],
    "cases": ["${cases// /\", \"}"], "exclude-cases": [], "exclude-agent-cases": {}
}
JSON
        "$home/venv/bin/wstest" --mode fuzzingclient --spec "$home/run/$name.json" >"$home/run/$name.log" 2>&1 &
        suites+=($!)
        running+=($!)
    done
    wait "${suites[@]}" || true
}

check_reports() {
    "$home/venv/bin/python" tests/autobahn/check_reports.py "$home"/run/*/index.json
}

# Most cases wait a second for bytes that must not arrive. Those of 9 use much CPU, which would
# delay the others.
run '1.* 2.* 3.* 4.*' '5.* 7.* 10.*' '6.1.* 6.2.* 6.3.* 6.4.* 6.5.* 6.6.* 6.7.* 6.8.* 6.9.*' \
    '6.10.* 6.11.* 6.12.* 6.13.* 6.14.* 6.15.* 6.16.* 6.17.* 6.18.* 6.19.* 6.20.* 6.21.* 6.22.* 6.23.*'
run '9.*'
if ! check_reports >"$home/run/failures"; then
    # Many cases depend on time, and the echo of a short one may arrive in the next: what failed
    # beside the others runs once more, alone.
    cat "$home/run/failures"
    failed=$(sed -n 's/^\([0-9.]*\): .*/\1/p' "$home/run/failures" | tr '\n' ' ')
    if [[ -n $failed ]]; then
        echo "Once more, alone: $failed"
        run "${failed% }"
    fi
fi
check_reports
