#!/usr/bin/env bash
# Builds and starts fanfare in each way that it is installed: cargo install, the Debian package, and
# the container image where Docker runs. Builds without optimization: this checks the files.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

say() { printf '\n== %s\n' "$*"; }
not_checked() { printf '\n!! NOT CHECKED: %s\n' "$*"; }
fail() { printf '%s\n' "$*" >&2 && exit 1; }

work=$(mktemp -d)
node=
finish() {
    if [[ -n $node ]]; then
        kill -KILL "$node" 2>/dev/null || true
    fi
    rm -rf "$work"
}
trap finish EXIT

# Starts this program on a free port, requests /healthz, and stops it.
starts() {
    local log=$work/log address
    "$1" --version
    "$1" --listen 127.0.0.1:0 --admin off >"$log" 2>&1 &
    node=$!
    for ((i = 0; i < 600; i++)); do
        address=$(sed -n 's|.* serving \(http://[^/]*\)/.*|\1|p' "$log")
        [[ -z $address ]] || break
        kill -0 "$node" 2>/dev/null || break
        sleep 0.1
    done
    [[ -n $address ]] || fail "$1 does not start: $(cat "$log")"
    curl --silent --show-error --fail "$address/healthz"
    kill -TERM "$node"
    wait "$node" || fail "$1 does not stop: $(cat "$log")"
    node=
}

say "cargo install"
cargo install --quiet --locked --debug --no-track --path . --root "$work/cargo"
starts "$work/cargo/bin/fanfare"

say "Debian package"
if ! cargo deb --version >/dev/null 2>&1; then
    timeout 20m cargo install --quiet --locked --debug cargo-deb@3.8.0
fi
tests/install.sh <<<"dpkg dpkg-deb"
cargo deb --quiet --locked --profile dev --output "$work/fanfare.deb"
dpkg-deb --info "$work/fanfare.deb"
dpkg-deb --extract "$work/fanfare.deb" "$work/debian"
while read -r mode path; do
    found=$(stat -c %a "$work/debian$path") || fail "the package lacks $path"
    [[ $found == "$mode" ]] || fail "$path has mode $found instead of $mode"
done <<'LIST'
755 /usr/bin/fanfare
600 /etc/fanfare/fanfare.env
644 /usr/lib/systemd/system/fanfare.service
644 /usr/lib/systemd/system/fanfare@.service
644 /usr/lib/systemd/system/fanfare.socket
644 /usr/share/fanfare/99-fanfare.conf
644 /usr/share/doc/fanfare/README.md
644 /usr/share/doc/fanfare/docs/deployment.md
644 /usr/share/doc/fanfare/grafana/alerts.yml
644 /usr/share/doc/fanfare/grafana/fanfare.json
644 /usr/share/doc/fanfare/copyright
LIST
dpkg-deb --control "$work/fanfare.deb" "$work/control"
grep -qx /etc/fanfare/fanfare.env "$work/control/conffiles" || fail "an upgrade would replace fanfare.env"
if grep -q '#DEBHELPER#' "$work"/control/p*; then
    fail "cargo deb did not complete the scripts in packaging/"
fi
"$work/debian/usr/bin/fanfare" help >/dev/null
starts "$work/debian/usr/bin/fanfare"

# Installs into an empty root, with the scripts. Where systemd runs they would talk to it.
if ((EUID == 0)) && [[ ! -d /run/systemd/system ]]; then
    mkdir -p "$work/installed/var/lib/dpkg"
    touch "$work/installed/var/lib/dpkg/status"
    dpkg="dpkg --root=$work/installed --force-depends --force-script-chrootless"
    $dpkg --install "$work/fanfare.deb"
    starts "$work/installed/usr/bin/fanfare"
    $dpkg --remove fanfare
    [[ -e $work/installed/etc/fanfare/fanfare.env ]] || fail "removal deletes the settings"
    [[ ! -e $work/installed/usr/bin/fanfare ]] || fail "removal leaves the program"
else
    not_checked "installation of the package, which needs root and a machine without systemd"
fi

say "Files of the container image"
# What the image's build sees, built with its command (and the toolchain of all other builds).
mkdir "$work/image"
cp rust-toolchain.toml "$work/image/"
sed -n 's/^!//p' .dockerignore | xargs -I{} cp -r {} "$work/image/"
build=$(sed -n 's/^ *\(cargo build --release --locked\) .*/\1/p' Dockerfile)
[[ -n $build ]] || fail "Dockerfile has another build command: change this script"
target=$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
(cd "$work/image" && CARGO_TARGET_DIR=$target ${build/--release/})
starts "$target/debug/fanfare"

if docker info >/dev/null 2>&1; then
    say "Container image"
    docker build --tag fanfare-test .
    docker run --detach --name fanfare-test --read-only --cap-drop ALL fanfare-test --allow-anonymous
    trap 'docker rm --force fanfare-test >/dev/null; finish' EXIT
    user=$(docker inspect --format '{{.Config.User}}' fanfare-test)
    [[ -n $user && $user != root && $user != 0 ]] || fail "the image runs as root"
    for ((i = 0; i < 60; i++)); do
        health=$(docker inspect --format '{{.State.Health.Status}}' fanfare-test)
        [[ $health == starting ]] || break
        sleep 1
    done
    [[ $health == healthy ]] || fail "the container is $health: $(docker logs fanfare-test 2>&1)"
else
    not_checked "the container image, since no Docker daemon runs here. Its files build and start"
fi
