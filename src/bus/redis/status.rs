//! Whether Redis works for this node, as `/readyz` and the log show it.

use std::borrow::Cow;

use super::primaries::FIRST;
use super::session::Session;
use super::{Bus, advice};
use crate::bus::BusError;

/// Unless it is `Working`, each variant holds advice for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// No attempt to connect has finished yet.
    Starting(String),
    Working,
    /// There is no connection, or no reply. It may come back by itself.
    Unreachable(&'static str),
    /// Redis replies with errors. Someone has to change its settings, or ours.
    Rejecting(Cow<'static, str>),
}

impl Status {
    pub(super) fn unreachable(error: &str) -> Status {
        Status::Unreachable(advice::for_connection(error))
    }

    pub(super) fn rejecting(error: &str) -> Status {
        Status::Rejecting(advice::for_error_reply(error).into())
    }

    /// What is wrong and what to do; `None` if Redis works.
    pub(super) fn advice(&self) -> Option<&str> {
        match self {
            Status::Working => None,
            Status::Starting(target) => Some(target),
            Status::Unreachable(advice) => Some(advice),
            Status::Rejecting(advice) => Some(advice),
        }
    }
}

impl Bus {
    /// Changes the status. `error` is the text of Redis or of the connection, for the log.
    pub(super) fn set_status(&mut self, primary: usize, status: Status, error: Option<&str>) {
        let primary = &mut self.primaries[primary];
        let Some(old) = primary.link.set_status(status.clone()) else { return };
        let address = primary.address.as_deref();
        match (&old, status.advice()) {
            (_, None) => {
                let server = primary.link.session().map(|session| session.server.to_string());
                tracing::info!(address, server, "bus available");
                self.handles.metrics.set_server(server);
            }
            (Status::Unreachable(_), Some(advice)) if matches!(status, Status::Unreachable(_)) => {
                tracing::debug!(address, error, advice, "bus still unavailable");
            }
            (_, Some(advice)) => tracing::warn!(address, error, advice, "bus unavailable, retrying"),
        }
        self.report_readiness();
    }

    /// The node is ready if one primary works. The others are named.
    pub(super) fn report_readiness(&self) {
        let is_cluster = self.primaries.is_cluster_known();
        let used = self.primaries.iter().filter(|(at, _)| !is_cluster || *at != FIRST);
        let (mut works, mut problems) = (false, Vec::new());
        for (_, primary) in used {
            match (primary.link.status().advice(), &primary.address) {
                (None, _) => works = true,
                (Some(advice), None) => problems.push(advice.to_owned()),
                (Some(advice), Some(address)) => problems.push(format!("{address}: {advice}")),
            }
        }
        let problems = (!problems.is_empty()).then(|| problems.join("; "));
        let (whole, part) = if works { (None, problems) } else { (problems, None) };
        self.handles.readiness.set_bus(whole);
        self.handles.readiness.set_unavailable_primaries(part);
    }

    /// Why the channels of a primary are unavailable, if they are.
    pub(super) fn unavailable(&self, primary: usize) -> Option<BusError> {
        self.primaries[primary].link.status().advice().map(|advice| BusError::Unavailable(advice.into()))
    }

    /// Why there is no session with a primary.
    pub(super) fn why_no_session(&self, primary: usize) -> BusError {
        self.unavailable(primary).unwrap_or_else(|| BusError::Unavailable("reconnecting".into()))
    }

    /// The session with a primary, unless its channels are unavailable.
    pub(super) fn usable_session(&self, primary: usize) -> Result<&Session, BusError> {
        let session = self.primaries[primary].link.session().filter(|_| self.unavailable(primary).is_none());
        session.ok_or_else(|| self.why_no_session(primary))
    }
}
