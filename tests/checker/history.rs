//! What happened in a run, as those who took part noted it.

/// A count that rises with everything noted in a run, whoever notes it: what has the lower one came first.
pub type Moment = u64;

/// One event that someone tried to publish.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// What keeps the order of its publisher's attempts: one connection, or one who awaits each answer.
    pub line: String,
    /// The event as clients must see it, without its id. No two attempts have the same.
    pub body: String,
    /// The only user it is for.
    pub to: Option<String>,
    /// Before the first byte of it was sent.
    pub begun: Moment,
    /// When the outcome was known.
    pub ended: Moment,
    /// What the publisher was told.
    pub outcome: Outcome,
}

/// What a publisher was told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// It was taken, with this id.
    Acked(u64),
    /// It was certainly not taken.
    Refused,
    /// It may or may not have been taken; no answer is this too.
    Unknown,
}

/// What a client saw.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// It was let in by a welcome frame.
    Welcomed {
        /// The position it asked to go on from; `None` for a newcomer.
        asked: Option<u64>,
        /// The position it was given.
        at: u64,
        /// The last id at that moment.
        head: u64,
        /// Whether it was told that nothing is missing.
        recovered: bool,
    },
    /// It was let in without a word, as a client that asks for no recovery.
    LetIn,
    /// An event: id, everything else of it, and the user it shows as the only one it is for.
    Event(u64, String, Option<String>),
    /// It was told that events up to here may be missing.
    Reset(u64),
    /// It was told its position, by a ping: it has all up to here, and may come back with that.
    Stands(u64),
    /// The connection ended, with this close code if there was one.
    Ended(Option<u16>),
}

/// One client, over all its connections.
#[derive(Clone, Debug)]
pub struct Subscriber {
    /// Tells it from the others.
    pub name: String,
    /// The user it is connected as.
    pub user: String,
    /// The node it stays on while it can.
    pub home: Option<usize>,
    /// Whether it asks for recovery frames.
    pub recovers: bool,
    /// Whether it was connected to the end of the run, and had all the time it needed to read on.
    pub stayed: bool,
    /// What it saw, in order.
    pub seen: Vec<(Moment, Seen)>,
}

impl Subscriber {
    /// How often it was told that events may be missing.
    pub fn announcements(&self) -> usize {
        let told = |seen: &Seen| match seen {
            Seen::Reset(_) | Seen::Ended(Some(4008)) => true,
            Seen::Welcomed { asked, recovered, .. } => asked.is_some() && !recovered,
            _ => false,
        };
        self.seen.iter().filter(|(_, seen)| told(seen)).count()
    }

    /// How many events it saw.
    pub fn events(&self) -> usize {
        self.seen.iter().filter(|(_, seen)| matches!(seen, Seen::Event(..))).count()
    }

    /// How often it was connected.
    pub fn connections(&self) -> usize {
        let joined = |seen: &Seen| matches!(seen, Seen::Welcomed { .. } | Seen::LetIn);
        self.seen.iter().filter(|(_, seen)| joined(seen)).count()
    }
}

/// All that was noted in a run of one channel.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Every attempt to publish there, without exception.
    pub attempts: Vec<Attempt>,
    /// Every client that was noted.
    pub subscribers: Vec<Subscriber>,
    /// There were two primaries at once, or Redis lost all it knew while its clock was set back. Then the promise
    /// holds within each run, and a client may be led to lower ids, behind an announcement, and from there sees again
    /// what it had seen of that run; that later events have higher ids can't be had.
    pub ids_may_fall: bool,
}
