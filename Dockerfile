# syntax=docker/dockerfile:1

# docker build -t fanfare .
# docker run -p 8080:8080 --stop-timeout 30 fanfare --allow-anonymous
#
# Other hosts can reach the listener, so the node does not start without --jwt-key FILE (mount the
# file) or --allow-anonymous. --stop-timeout must be longer than --drain-timeout (20 s): Docker's
# default of 10 s would kill the node while it closes connections. The node needs no capability and
# writes no file: add --read-only --cap-drop ALL.

FROM rust:1-bookworm AS build
WORKDIR /fanfare
COPY Cargo.toml Cargo.lock ./
COPY benches benches
COPY src src
# Both caches are kept between builds, so the binary is copied out of them.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/fanfare/target \
    cargo build --release --locked && cp target/release/fanfare /usr/local/bin/

FROM busybox:1.37-musl AS busybox

# glibc, CA certificates for rediss://, and a user without rights; no shell.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /usr/local/bin/fanfare /usr/bin/fanfare
# busybox is static and runs as the applet it is named after.
COPY --from=busybox /bin/busybox /usr/bin/wget
ENV FANFARE_LISTEN=0.0.0.0:8080
EXPOSE 8080
# Whether the node runs, not whether Redis does (/readyz): a restart would not help against that.
# Change the port here if --listen changes it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s \
    CMD ["/usr/bin/wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8080/healthz"]
ENTRYPOINT ["/usr/bin/fanfare"]
