#!/bin/sh
# Prints fanfare@.service, made from fanfare.service. After a change there:
#   systemd/make-instances.sh >systemd/fanfare@.service
set -eu
cd "$(dirname "$0")"

cat <<'HEAD'
# One of several nodes on this machine, behind a proxy: fanfare@8081 takes clients on
# 127.0.0.1:8081. Its admin listener is the same port on 127.0.0.2. Made from fanfare.service by
# make-instances.sh.
HEAD
# Nodes can't share a RuntimeDirectory=: systemd removes it when the first of them stops.
sed -e 1d \
    -e '/^Description=/s/$/, on port %i/' \
    -e '/^ExecStart=/s/$/ --listen 127.0.0.1:%i --admin 127.0.0.2:%i/' \
    -e '/^# For --admin unix:/,/^$/d' \
    fanfare.service
