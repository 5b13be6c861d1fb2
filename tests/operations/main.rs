//! A node in operation: systemd, nginx, TLS, shutdown and rolling restarts, diagnosis, metrics and
//! logs.

#[path = "../checker/mod.rs"]
mod checker;
#[path = "../common/mod.rs"]
mod common;
#[path = "../workload/mod.rs"]
mod workload;

mod alerts;
mod behind_nginx;
mod client_libraries;
mod code_blocks;
mod doctor;
mod drain;
mod examples;
mod inbox_worker;
mod observability;
mod rolling;
mod start_texts;
mod systemd;
mod systemd_units;
mod tls;
