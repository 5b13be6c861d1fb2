//! What happened in a run, as recorded by its publishers and subscribers.

/// A logical clock, which rises with every record of a run.
pub type Moment = u64;

/// An attempt to publish one event.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Names a sequence of attempts whose order is kept: one connection, or a publisher that waits
    /// for each answer.
    pub line: String,
    /// The event as subscribers see it, without its id. Unique in a run.
    pub body: String,
    /// The recipient, if it is a private event.
    pub to: Option<String>,
    /// Before its first byte was sent.
    pub started: Moment,
    /// When the outcome was known.
    pub finished: Moment,
    pub outcome: Outcome,
}

/// The answer to a publish.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// Published with this id.
    Acked(u64),
    /// Certainly not published.
    Rejected,
    /// Perhaps published, or no answer.
    Unknown,
}

/// What a client saw.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// A welcome frame.
    Welcomed {
        /// The position it resumed from; `None` on a first join.
        asked: Option<u64>,
        /// The position in the welcome.
        at: u64,
        /// The last id at that moment.
        head: u64,
        /// Whether the server claimed that nothing is missing.
        recovered: bool,
    },
    /// A join without recovery, which has no welcome.
    LetIn,
    /// An event: id, its other members, and the user it is for, if it is private.
    Event(u64, String, Option<String>),
    /// A reset: events up to this position may be missing.
    Reset(u64),
    /// A ping with the client's position: it has everything up to it, and may resume from it.
    Stands(u64),
    /// The end of the connection, with the close code, if any, or of the subscription.
    Ended(Option<u16>),
}

/// A client in one of its channels, over all its connections.
#[derive(Clone, Debug)]
pub struct Subscriber {
    pub name: String,
    pub user: String,
    /// The node it stays on while it can.
    pub home: Option<usize>,
    /// Whether it uses recovery frames.
    pub recovers: bool,
    /// Whether it followed the channel to the end of the run, and had time to read everything.
    pub stayed: bool,
    /// What it saw, in order.
    pub seen: Vec<(Moment, Seen)>,
}

impl Subscriber {
    /// The number of announced losses.
    pub fn announcements(&self) -> usize {
        let is_announcement = |seen: &Seen| match seen {
            Seen::Reset(_) | Seen::Ended(Some(4008)) => true,
            Seen::Welcomed { asked, recovered, .. } => asked.is_some() && !recovered,
            _ => false,
        };
        self.seen.iter().filter(|(_, seen)| is_announcement(seen)).count()
    }

    /// The number of events seen.
    pub fn events(&self) -> usize {
        self.seen.iter().filter(|(_, seen)| matches!(seen, Seen::Event(..))).count()
    }

    /// The number of joins.
    pub fn connections(&self) -> usize {
        let joined = |seen: &Seen| matches!(seen, Seen::Welcomed { .. } | Seen::LetIn);
        self.seen.iter().filter(|(_, seen)| joined(seen)).count()
    }
}

/// The records of a run on one channel.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Its name, for the texts of violations.
    pub channel: String,
    /// Every attempt to publish on the channel.
    pub attempts: Vec<Attempt>,
    /// Every recorded client.
    pub subscribers: Vec<Subscriber>,
    /// Whether there were two primaries at once, or Redis lost all data while its clock was set
    /// back. Then the promise holds within each epoch: after an announced loss a client may get
    /// lower ids, and events of that epoch again. Later events need not have higher ids.
    pub ids_may_fall: bool,
}
