//! Whether Redis works for this node, as `/readyz` and the log show it.

use std::borrow::Cow;

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
    pub(super) fn set_status(&mut self, status: Status, error: Option<&str>) {
        let Some(old) = self.link.set_status(status.clone()) else { return };
        match (&old, status.advice()) {
            (_, None) => {
                let server = self.link.session().map(|session| session.server.to_string());
                tracing::info!(server, "bus available");
                self.handles.metrics.set_server(server);
            }
            (Status::Unreachable(_), Some(advice)) if matches!(status, Status::Unreachable(_)) => {
                tracing::debug!(error, advice, "bus still unavailable");
            }
            (_, Some(advice)) => tracing::warn!(error, advice, "bus unavailable, retrying"),
        }
        self.handles.readiness.set_bus(status.advice().map(str::to_owned));
    }

    /// Why Redis can't be asked now, if it can't.
    pub(super) fn unavailable(&self) -> Option<BusError> {
        self.link.status().advice().map(|advice| BusError::Unavailable(advice.into()))
    }
}
