//! Whether the bus works, for `/readyz` and the log.

use std::borrow::Cow;

use super::{Bus, advice};

/// What is wrong, by kind, in words that say what to do. Redis comes back by itself; what it refuses needs someone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    Starting,
    Away(&'static str),
    Refuses(Cow<'static, str>),
}

impl Trouble {
    pub(super) fn text(&self) -> &str {
        match self {
            Trouble::Starting => "the bus has not answered yet",
            Trouble::Away(text) => text,
            Trouble::Refuses(text) => text,
        }
    }

    pub(super) fn away(words: &str) -> Trouble {
        Trouble::Away(advice::away(words))
    }

    pub(super) fn refuses(words: &str) -> Trouble {
        Trouble::Refuses(advice::refused(words).into())
    }
}

impl Bus {
    /// Says whether the bus works: to the balancer at once, to the log only when it changes, there with Redis' own
    /// words.
    pub(super) fn set_trouble(&mut self, trouble: Option<Trouble>, words: &str) {
        if self.link.trouble == trouble {
            return;
        }
        match (&self.link.trouble, &trouble) {
            (_, None) => tracing::info!("the bus works"),
            (Some(Trouble::Away(_)), Some(Trouble::Away(text))) => {
                tracing::debug!(?words, "the bus is away still: {text}")
            }
            (_, Some(trouble)) => {
                tracing::warn!(?words, "the bus does not work, trying again for ever: {}", trouble.text())
            }
        }
        self.readiness.set_bus(trouble.as_ref().map(|trouble| trouble.text().to_owned()));
        self.link.trouble = trouble;
    }
}
