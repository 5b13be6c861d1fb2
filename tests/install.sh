#!/usr/bin/env bash
# Installs Debian packages that are missing. Reads lines of a package and a program that it brings:
#   tests/install.sh <<<"prometheus promtool"
set -euo pipefail
export PATH=$PATH:/usr/sbin # where Debian has nginx

missing=()
while read -r package program; do
    command -v "$program" >/dev/null || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    exit
fi

printf '\n== %s\n' "Installing ${missing[*]}"
as_root=()
if ((EUID != 0)); then
    as_root=(sudo)
fi
install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends)
# Package lists may be missing or old: fetch them and try again.
"${install[@]}" "${missing[@]}" || { "${as_root[@]}" apt-get update && "${install[@]}" "${missing[@]}"; }
