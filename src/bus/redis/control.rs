//! Commands of backends. They are events of the control channel, which every node follows from its
//! first session on: without shards, since the commands are executed here. A node that was cut off
//! reads what it missed, as in any channel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::commands::Script;
use super::errors::{CallError, is_temporary};
use super::primaries::SessionId;
use super::publishing::is_certain;
use super::scripts::{self, StoredBans};
use super::{Bus, Outcome, advice};
use crate::bus::OrderWaiter;
use crate::bus::control::{Executor, OrderError};
use crate::bus::sequence::Sequence;
use crate::limits::bans::BANS_MAX;
use crate::metrics::WarningLimit;
use crate::protocol::control::{Command, Order};
use crate::protocol::event::{ChannelName, Entry, EventId, Kind};

/// Sleep after the channel or the bans could not be read.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The commands that this node has yet to execute or to answer.
pub(super) struct Control {
    pub(super) executor: Executor,
    /// Orders that Redis has stored and that this node has not executed yet.
    waiting: Vec<(EventId, OrderWaiter)>,
    /// This node has executed all commands after this position: here it has started, or missed some.
    continuous_from: EventId,
    /// When to try again to follow the channel.
    follow_at: Instant,
    /// When to read the bans; `None` if they are known.
    read_at: Option<Instant>,
    reading: Option<BansRead>,
    /// The first probes of the session have yet to be sent. They show that the node is ready, so
    /// they wait until the node follows the channel and knows the bans.
    probe_due: bool,
    /// Warnings of commands that this version does not know.
    unknown: WarningLimit,
    /// Warnings of errors of Redis.
    failed: WarningLimit,
}

/// A read of the bans that is in flight.
struct BansRead {
    session: SessionId,
    /// Users who were banned meanwhile until this time, or unbanned (0). Redis may have read the bans
    /// before that.
    changed: Vec<(Arc<str>, u64)>,
}

impl Control {
    pub(super) fn new(executor: Executor) -> Control {
        Control {
            executor,
            waiting: Vec::new(),
            continuous_from: EventId(0),
            follow_at: Instant::now(),
            read_at: None,
            reading: None,
            probe_due: false,
            unknown: WarningLimit::default(),
            failed: WarningLimit::default(),
        }
    }

    /// Executes the commands of an entry. After a reset it is unknown which commands this node
    /// missed, but bans are kept in Redis.
    pub(super) fn on_entry(&mut self, entry: &Entry) {
        if entry.kind == Kind::Reset {
            return self.on_lost(entry.last);
        }
        for event in entry.texts() {
            match Command::parse(event) {
                Some(command) => self.execute(command),
                None if self.unknown.is_due(Instant::now()) => {
                    let event = String::from_utf8_lossy(event);
                    tracing::warn!(%event, "unknown command: is another node of a newer version?");
                }
                None => {}
            }
        }
    }

    /// Commands up to this position were not executed.
    fn on_lost(&mut self, position: EventId) {
        tracing::warn!(
            "commands to disconnect users may be lost: redis has lost data, the node was cut off for too long, \
             or could not read them"
        );
        self.continuous_from = position;
        self.read_at = Some(Instant::now());
    }

    fn execute(&mut self, command: Command) {
        tracing::debug!(?command, "executing command");
        let change = match &command {
            Command::Disconnect { .. } => None,
            Command::Ban { user, until } => Some((user.clone(), *until)),
            Command::Unban { user } => Some((user.clone(), 0)),
        };
        if let Some((reading, change)) = self.reading.as_mut().zip(change)
            && reading.changed.len() <= BANS_MAX
        {
            reading.changed.push(change);
        }
        // A ban that has ended already: the clock of Redis may have been set back.
        if !self.executor.execute(command) {
            self.read_at = Some(Instant::now());
        }
    }

    /// Answers the orders up to this position: the shards have their commands, or never get them.
    pub(super) fn answer_up_to(&mut self, position: EventId) {
        for (id, waiter) in self.waiting.extract_if(.., |(id, _)| *id <= position) {
            let is_executed = id > self.continuous_from;
            let answer = if is_executed { Ok(id) } else { Err(OrderError::Unknown) };
            let _ = waiter.send(answer); // fails if the task no longer waits
        }
    }
}

impl Bus {
    /// The position up to which this node has executed commands, once it follows the channel.
    pub(super) fn control_position(&self) -> Option<EventId> {
        let followed = self.channels.get(&ChannelName::control())?.followed.as_ref()?;
        followed.sequence.as_ref().map(Sequence::position)
    }

    /// The primary of the control channel.
    pub(super) fn control_primary(&self) -> usize {
        self.primaries.of(&ChannelName::control())
    }

    /// A new session subscribes to all followed channels of its primary with this ticket: the control
    /// channel is one of them.
    pub(super) fn follow_control(&mut self, primary: usize, ticket: u64) {
        if self.control_primary() != primary {
            return;
        }
        self.control.probe_due = true;
        let name = ChannelName::control();
        if self.channels.get(&name).is_none_or(|channel| channel.followed.is_none()) {
            self.start_following(name, Vec::new(), ticket);
        }
    }

    /// The node follows the channel after this position. Earlier commands were for connections that
    /// it did not have, unless it was ready before. Bans may still be in force.
    pub(super) fn on_control_started(&mut self, position: EventId) {
        self.control.continuous_from = position;
        if !self.handles.readiness.are_commands_pending() {
            self.control.on_lost(position);
        }
        self.read_bans();
    }

    /// The position of the channel can't be read.
    pub(super) fn on_control_failed(&mut self, error: &CallError) {
        self.control.follow_at = Instant::now() + RETRY_DELAY;
        self.on_control_error(error, "can't follow commands to disconnect users, retrying");
    }

    /// If the data of the channel is damaged, other channels work all the same. The log of faults
    /// names the key.
    fn on_control_error(&mut self, error: &CallError, message: &'static str) {
        let CallError::ErrorReply(text) = error else { return }; // the session is closed
        if error.is_fault() {
            return self.start_probes();
        }
        if self.control.failed.is_due(Instant::now()) {
            tracing::warn!(error = &**text, "{message}");
        }
        if self.control.probe_due {
            self.on_probe_rejected(self.control_primary(), text);
        }
    }

    fn start_probes(&mut self) {
        if std::mem::take(&mut self.control.probe_due) {
            self.handles.readiness.follow_commands();
            self.probe_all(self.control_primary());
        }
    }

    /// Follows the control channel if that has failed, reads the bans if that is due, and forgets
    /// orders that nobody waits for.
    pub(super) fn check_control(&mut self, now: Instant) {
        self.control.waiting.retain(|(_, waiter)| !waiter.is_closed());
        if self.primaries[self.control_primary()].link.session().is_none() {
            return;
        }
        let name = ChannelName::control();
        if self.channels.get(&name).is_none_or(|channel| channel.followed.is_none()) {
            if now >= self.control.follow_at {
                self.subscribe(name, Vec::new());
            }
        } else if self.control.read_at.is_some_and(|at| now >= at) {
            self.read_bans();
        }
    }

    /// Reads the bans, unless that is under way: then again after it.
    pub(super) fn read_bans(&mut self) {
        let id = self.primaries.session_id(self.control_primary());
        let Some(session) = self.primaries[id.primary].link.session() else { return };
        if self.control.reading.as_ref().is_some_and(|reading| reading.session == id) {
            self.control.read_at = Some(Instant::now());
            return;
        }
        self.control.reading = Some(BansRead { session: id, changed: Vec::new() });
        self.control.read_at = None;
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let key = self.handles.settings.channel_key(&ChannelName::control());
        let args = scripts::bans_args(&self.handles.settings);
        tokio::spawn(async move {
            let reply = commands.run(Script::Bans, &key, args).await;
            let unexpected = || CallError::unexpected_reply("bans.lua");
            let bans = reply.and_then(|frame| scripts::parse_bans(&frame).ok_or_else(unexpected));
            let _ = outcomes.send(Outcome::BansRead(id, bans));
        });
    }

    pub(super) fn on_bans_read(&mut self, session: SessionId, result: Result<StoredBans, CallError>) {
        let control = &mut self.control;
        let Some(reading) = control.reading.take_if(|reading| reading.session == session) else {
            return; // another session has started to read them
        };
        match result {
            Ok(StoredBans { now, mut bans }) if reading.changed.len() <= BANS_MAX => {
                bans.extend(reading.changed);
                control.executor.replace_bans(now, bans);
                self.start_probes();
            }
            Ok(_) => control.read_at = Some(Instant::now()),
            Err(error) => {
                control.read_at = Some(Instant::now() + RETRY_DELAY);
                self.on_control_error(&error, "can't read the bans, retrying");
                self.on_call_error(session, &error);
            }
        }
    }

    /// Stores a command. It is sent once: a retry would close connections that were opened after
    /// the first attempt.
    pub(super) fn order(&mut self, order: &Order, waiter: OrderWaiter) {
        let id = self.primaries.session_id(self.control_primary());
        let session = match self.usable_session(id.primary) {
            Ok(session) => session,
            Err(why) => {
                let _ = waiter.send(Err(OrderError::Rejected(why.to_string().into())));
                return;
            }
        };
        let name = ChannelName::control();
        let known = self.channels.get(&name).map(|channel| channel.known).unwrap_or_default();
        let args = scripts::order_args(&self.handles.settings, known, order);
        let (commands, outcomes, session) = (session.commands(), self.handles.outcomes.clone(), id);
        let key = self.handles.settings.channel_key(&name);
        tokio::spawn(async move {
            let reply = commands.run(Script::Order, &key, args).await;
            let unexpected = || CallError::unexpected_reply("order.lua");
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
                self.control.waiting.push((*id, waiter));
                if let Some(position) = self.control_position() {
                    self.control.answer_up_to(position);
                }
                return;
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
