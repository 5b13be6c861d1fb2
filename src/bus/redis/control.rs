//! Commands of backends. They are events of the control channel, which every node follows from its
//! first session on: without shards, since the commands are executed here. A node that was cut off
//! reads what it missed, as in any channel.

use std::time::{Duration, Instant};

use super::commands::Script;
use super::errors::{CallError, is_temporary};
use super::primaries::SessionId;
use super::publishing::is_certain;
use super::scripts::{self, StoredBans};
use super::{Bus, Outcome, advice};
use crate::bus::control::{Executor, OrderError};
use crate::bus::{BusError, OrderWaiter};
use crate::metrics::WarningLimit;
use crate::protocol::control::{Command, Order};
use crate::protocol::event::{ChannelName, Entry, EventId, Kind};

/// Sleep after bans could not be read.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The commands that this node has yet to execute or to answer.
pub(super) struct Control {
    executor: Executor,
    /// Orders that Redis has stored and that this node has not got yet.
    waiting: Vec<(EventId, OrderWaiter)>,
    /// When to try again to follow the channel.
    follow_at: Instant,
    /// When to read the bans; `None` if they are known.
    read_at: Option<Instant>,
    reading: bool,
    /// Warnings of commands that this version does not know.
    unknown: WarningLimit,
}

impl Control {
    pub(super) fn new(executor: Executor) -> Control {
        Control {
            executor,
            waiting: Vec::new(),
            follow_at: Instant::now(),
            read_at: None,
            reading: false,
            unknown: WarningLimit::default(),
        }
    }

    /// Executes the commands of an entry. After a reset it is unknown which commands this node
    /// missed, but bans are kept in Redis.
    pub(super) fn on_entry(&mut self, entry: &Entry) {
        if entry.kind == Kind::Reset {
            tracing::warn!(
                "commands to disconnect users may be lost: redis has lost data, or the node was cut off for too long"
            );
            self.read_at = Some(Instant::now());
            return;
        }
        for event in entry.texts() {
            match Command::parse(event) {
                Some(command) => {
                    tracing::debug!(?command, "executing command");
                    self.executor.execute(command);
                }
                None if self.unknown.is_due(Instant::now()) => {
                    let event = String::from_utf8_lossy(event);
                    tracing::warn!(%event, "unknown command: is another node of a newer version?");
                }
                None => {}
            }
        }
    }

    /// Answers the orders up to this position: the shards have their commands.
    pub(super) fn answer_up_to(&mut self, position: EventId) {
        for (id, waiter) in self.waiting.extract_if(.., |(id, _)| *id <= position) {
            let _ = waiter.send(Ok(id)); // fails if the task no longer waits
        }
    }

    /// Answers all orders: this node gets their commands in a later session.
    pub(super) fn end_session(&mut self) {
        self.answer_up_to(EventId(u64::MAX));
    }

    pub(super) fn expire_bans(&self) {
        self.executor.expire_bans();
    }
}

impl Bus {
    /// The base of the control channel and the position up to which this node has executed its
    /// commands, once it follows the channel.
    pub(super) fn control_position(&self) -> Option<(EventId, EventId)> {
        let followed = self.channels.get(&ChannelName::control())?.followed.as_ref()?;
        followed.sequence.as_ref().map(|sequence| (sequence.base(), sequence.position()))
    }

    /// The primary of the control channel.
    pub(super) fn control_primary(&self) -> usize {
        self.primaries.of(&ChannelName::control())
    }

    /// A new session subscribes to all followed channels of its primary with this ticket: the control
    /// channel is one of them.
    pub(super) fn follow_control(&mut self, primary: usize, ticket: u64) {
        let name = ChannelName::control();
        if self.control_primary() == primary
            && self.channels.get(&name).is_none_or(|channel| channel.followed.is_none())
        {
            self.start_following(name, Vec::new(), ticket);
        }
    }

    /// The node follows the channel from now on. Earlier commands were for connections that it did
    /// not have, but bans may still be in force.
    pub(super) fn on_control_started(&mut self) {
        self.control.read_at = Some(Instant::now());
        self.probe_all(self.control_primary());
    }

    /// The position of the channel can't be read. If its data is damaged, other channels work all
    /// the same.
    pub(super) fn on_control_failed(&mut self, error: &CallError) {
        self.control.follow_at = Instant::now() + RETRY_DELAY;
        if matches!(error, CallError::ErrorReply(_)) {
            self.probe_all(self.control_primary());
        }
    }

    /// Follows the control channel if that has failed, and reads the bans if that is due.
    pub(super) fn check_control(&mut self, now: Instant) {
        let id = self.primaries.session_id(self.control_primary());
        let Some(session) = self.primaries[id.primary].link.session() else { return };
        let name = ChannelName::control();
        let Some(channel) = self.channels.get(&name).filter(|channel| channel.followed.is_some()) else {
            if now >= self.control.follow_at {
                self.subscribe(name, Vec::new());
            }
            return;
        };
        if self.control.reading || self.control.read_at.is_none_or(|at| now < at) {
            return;
        }
        (self.control.reading, self.control.read_at) = (true, None);
        let args = scripts::bans_args(&self.handles.settings, channel.known);
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let key = self.handles.settings.channel_key(&name);
        tokio::spawn(async move {
            let reply = commands.run(Script::Bans, &key, args).await;
            let unexpected = || CallError::ErrorReply("unexpected reply of bans.lua".into());
            let bans = reply.and_then(|frame| scripts::parse_bans(&frame).ok_or_else(unexpected));
            let _ = outcomes.send(Outcome::BansRead(id, bans));
        });
    }

    pub(super) fn on_bans_read(&mut self, session: SessionId, result: Result<StoredBans, CallError>) {
        self.control.reading = false;
        let StoredBans { now, base, head, bans } = match result {
            Ok(stored) => stored,
            Err(error) => {
                self.control.read_at = Some(Instant::now() + RETRY_DELAY);
                return self.on_call_error(session, &error);
            }
        };
        // Commands that were executed meanwhile may have changed the bans. Later ones are executed
        // after this, and those that the bans include already do no harm.
        if self.control_position().is_some_and(|position| position > (base, head)) {
            self.control.read_at = Some(Instant::now());
            return;
        }
        self.control.executor.replace_bans(now, bans);
    }

    /// Stores a command. It is sent once: a retry would close connections that were opened after
    /// the first attempt.
    pub(super) fn order(&mut self, order: &Order, waiter: OrderWaiter) {
        let id = self.primaries.session_id(self.control_primary());
        let why = self.unavailable(id.primary);
        let Some(session) = self.primaries[id.primary].link.session().filter(|_| why.is_none()) else {
            let why = why.unwrap_or_else(|| BusError::Unavailable("reconnecting".into()));
            let _ = waiter.send(Err(OrderError::Rejected(why.to_string().into())));
            return;
        };
        let name = ChannelName::control();
        let known = self.channels.get(&name).map(|channel| channel.known).unwrap_or_default();
        let args = scripts::order_args(&self.handles.settings, known, order);
        let (commands, outcomes, session) = (session.commands(), self.handles.outcomes.clone(), id);
        let key = self.handles.settings.channel_key(&name);
        tokio::spawn(async move {
            let reply = commands.run(Script::Order, &key, args).await;
            let unexpected = || CallError::ErrorReply("unexpected reply of order.lua".into());
            let id = reply.and_then(|frame| super::reply::integer(&frame).ok_or_else(unexpected));
            let _ = outcomes.send(Outcome::Ordered(session, waiter, id.map(EventId)));
        });
    }

    pub(super) fn on_ordered(
        &mut self,
        session: SessionId,
        waiter: OrderWaiter,
        result: Result<EventId, CallError>,
    ) {
        let answer = match &result {
            Ok(EventId(0)) => Err(OrderError::TooManyBans),
            Ok(id) => {
                let is_executed = self.control_position().is_some_and(|(_, position)| *id <= position);
                if !is_executed && self.primaries.is_current(session) {
                    self.control.waiting.push((*id, waiter));
                    return;
                }
                Ok(*id)
            }
            Err(CallError::ErrorReply(text)) if is_temporary(text) || is_certain(text) => {
                Err(OrderError::Rejected(advice::for_error_reply(text).into()))
            }
            Err(CallError::ErrorReply(text)) => {
                tracing::error!(error = &**text, "order script failed");
                Err(OrderError::Unknown)
            }
            Err(CallError::NoReply(_) | CallError::NoReplyElsewhere(_)) => Err(OrderError::Unknown),
        };
        let _ = waiter.send(answer); // fails if the task no longer waits
        if let Err(error) = result {
            self.on_call_error(session, &error);
        }
    }
}
