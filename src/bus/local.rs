//! The bus of one node alone: ids, history and delivery in this process.

use super::Wiring;
use crate::config::Settings;

/// Runs until every sender of requests is gone.
pub async fn run(_settings: &Settings, _wiring: Wiring) {}
