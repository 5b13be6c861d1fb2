//! The events of one channel on their way to Redis, in order. One call is in flight; events that
//! arrive meanwhile wait for the next. Time is passed in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::bus::{Answer, Publish, PublishError};
use crate::protocol::event::EventId;
use crate::protocol::inbox::{MessageId, PublishedId};

/// Most events in one call. More would block Redis for more than 10 ms.
const BATCH_EVENTS: usize = 512;

/// Most bytes in one call, unless a single event has more.
pub const BATCH_BYTES: usize = 1 << 20;

/// An event, or a message for the channel's inbox.
#[derive(Debug)]
pub struct Item {
    /// Of an event the JSON up to the digits of the id, see [`text_before_id`]; of a message all.
    pub text: Bytes,
    /// The user who sent the message; `None` of an event.
    pub sender: Option<Arc<str>>,
    pub to: Option<Arc<str>>,
    /// The idempotency key.
    pub key: Option<Arc<str>>,
}

/// An item that waits for its first call.
#[derive(Debug)]
struct Queued {
    item: Item,
    answer: Answer,
    deadline: Instant,
}

/// The items of one call, which is repeated until it has a result: events or messages, not both.
#[derive(Debug)]
pub struct Batch {
    /// Unique in this process, and rising.
    pub number: u64,
    /// The channel's base at the first attempt.
    pub base: EventId,
    /// An earlier attempt may have reached Redis.
    pub retry: bool,
    /// Why Redis rejected a retry before it ran. The next call sends no events: it asks for the
    /// outcome of the attempt before.
    pub withdrawn: Option<Arc<str>>,
    pub items: Vec<Item>,
    /// Where each result goes, and the deadline; `None` once it has been sent.
    answers: Vec<(Option<Answer>, Instant)>,
}

/// The result of a publish, and where it goes.
pub type Completed = (Answer, Result<PublishedId, PublishError>);

#[derive(Debug, Default)]
pub struct PublishQueue {
    waiting: VecDeque<Queued>,
    /// The oldest events, without a result so far.
    batch: Option<Batch>,
    /// A call with the batch is in flight.
    in_flight: bool,
    bytes: usize,
}

/// About the memory that a queued event takes beside its texts.
const EVENT_OVERHEAD: usize = 256;

fn cost(item: &Item) -> usize {
    let names = [&item.sender, &item.to, &item.key];
    let names: usize = names.iter().map(|name| name.as_ref().map_or(0, |name| name.len())).sum();
    item.text.len() + names + EVENT_OVERHEAD
}

/// The text of an event up to the digits of its id, which is the last member. The script adds the
/// id.
fn text_before_id(event: &[u8]) -> Bytes {
    let open = event.strip_suffix(b"}").unwrap_or(event);
    let empty = open.iter().skip(1).all(u8::is_ascii_whitespace);
    let mut text = Vec::with_capacity(event.len() + 6);
    text.extend_from_slice(open);
    text.extend_from_slice(if empty { b"\"id\":" } else { b",\"id\":" });
    text.into()
}

impl PublishQueue {
    /// Whether no event waits and no call is in flight.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.batch.is_none() && !self.in_flight
    }

    /// Memory of the queued events.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn push(&mut self, publish: Publish, deadline: Instant) {
        let Publish { sender, to, key, event, answer, .. } = publish;
        let text = if sender.is_some() { event } else { text_before_id(&event) };
        let item = Item { text, sender, to, key };
        self.bytes += cost(&item);
        self.waiting.push_back(Queued { item, answer, deadline });
    }

    /// Whether the call in flight is about messages for the inbox.
    pub fn sends_messages(&self) -> bool {
        self.batch.as_ref().is_some_and(Batch::is_inbox)
    }

    /// Whether [`PublishQueue::call`] would return a call.
    pub fn is_ready(&self) -> bool {
        !self.in_flight && (self.batch.is_some() || !self.waiting.is_empty())
    }

    /// The call to make now: the last one if it has no result, else a new one with the number after
    /// `number`. Its result is one of [`PublishQueue::on_published`],
    /// [`PublishQueue::on_rejected`], [`PublishQueue::withdraw`] and [`PublishQueue::retry`].
    pub fn call(&mut self, base: EventId, number: &mut u64) -> Option<&Batch> {
        if !self.is_ready() {
            return None;
        }
        if self.batch.is_none() {
            *number += 1;
            self.batch = Some(self.next_batch(base, *number));
        }
        self.in_flight = true;
        self.batch.as_ref()
    }

    fn next_batch(&mut self, base: EventId, number: u64) -> Batch {
        let (items, answers) = (Vec::new(), Vec::new());
        let mut batch = Batch { number, base, retry: false, withdrawn: None, items, answers };
        let mut bytes = 0;
        while let Some(next) = self.waiting.front() {
            bytes += next.item.text.len();
            let is_full = batch.items.len() == BATCH_EVENTS || bytes > BATCH_BYTES;
            // An event with a key needs its own call: its id may be an earlier one.
            let alone = |item: &Item| item.sender.is_none() && item.key.is_some();
            if let Some(last) = batch.items.last()
                && (is_full
                    || last.sender.is_some() != next.item.sender.is_some()
                    || alone(last)
                    || alone(&next.item))
            {
                break;
            }
            let next = self.waiting.pop_front().expect("the front was just seen");
            batch.items.push(next.item);
            batch.answers.push((Some(next.answer), next.deadline));
        }
        batch
    }

    /// The call was published with ids from `first` on. `None`: it may or may not have been
    /// published, and never will be.
    pub fn on_published(&mut self, first: Option<EventId>) -> Vec<Completed> {
        self.complete(|at| match first {
            Some(first) => Ok(EventId(first.0 + at).into()),
            None => Err(PublishError::Unknown),
        })
    }

    /// The call stored messages with these ids; `None` stands for a message for which the inbox had
    /// no room.
    pub fn on_stored(&mut self, ids: &[Option<MessageId>]) -> Vec<Completed> {
        self.complete(|at| match ids.get(at as usize) {
            Some(Some(id)) => Ok(PublishedId::Message(*id)),
            Some(None) => Err(PublishError::Full),
            None => Err(PublishError::Unknown), // the reply is that of another version
        })
    }

    /// This attempt was certainly not published.
    pub fn on_rejected(&mut self, why: Arc<str>) -> Vec<Completed> {
        let is_retry = self.batch.as_ref().is_some_and(|batch| batch.retry);
        self.complete(|_| match is_retry {
            true => Err(PublishError::Unknown), // an earlier attempt may have been published
            false => Err(PublishError::Rejected(why.clone())),
        })
    }

    /// Redis rejects the call and always will. If an earlier attempt had no result, the next call
    /// asks for it.
    pub fn withdraw(&mut self, why: Arc<str>) -> Vec<Completed> {
        match &mut self.batch {
            Some(batch) if batch.retry => {
                batch.withdrawn = Some(why);
                self.in_flight = false;
                self.drop_answered();
                Vec::new()
            }
            _ => self.on_rejected(why),
        }
    }

    /// No attempt of a withdrawn call was published.
    pub fn on_withdrawn(&mut self) -> Vec<Completed> {
        let why = self.batch.as_ref().and_then(|batch| batch.withdrawn.clone());
        self.complete(|_| Err(PublishError::Rejected(why.clone().unwrap_or_default())))
    }

    /// Rejects the events that wait for their first call.
    pub fn reject_unsent(&mut self, why: &Arc<str>) -> Vec<Completed> {
        let waiting = std::mem::take(&mut self.waiting);
        self.bytes -= waiting.iter().map(|next| cost(&next.item)).sum::<usize>();
        waiting.into_iter().map(|next| (next.answer, Err(PublishError::Rejected(why.clone())))).collect()
    }

    /// The same call must be made again. `may_have_run`: it may have reached Redis.
    pub fn retry(&mut self, may_have_run: bool) {
        self.in_flight = false;
        if let Some(batch) = &mut self.batch {
            batch.retry |= may_have_run;
        }
        self.drop_answered();
    }

    /// Completes the batch. `result` takes the index of an event.
    fn complete(&mut self, result: impl Fn(u64) -> Result<PublishedId, PublishError>) -> Vec<Completed> {
        self.in_flight = false;
        let Some(batch) = self.batch.take() else { return Vec::new() };
        self.bytes -= batch.bytes();
        let answers = batch.answers.into_iter().enumerate();
        answers.filter_map(|(at, (answer, _))| Some((answer?, result(at as u64)))).collect()
    }

    /// Completes events whose deadline has passed. Events never sent are rejected, events sent are
    /// unknown.
    pub fn expire(&mut self, now: Instant) -> Vec<Completed> {
        let mut completed = Vec::new();
        if let Some(batch) = &mut self.batch {
            let sent = batch.retry || self.in_flight;
            for (answer, _) in batch.answers.iter_mut().filter(|(_, deadline)| *deadline <= now) {
                let error = if sent { PublishError::Unknown } else { timed_out() };
                completed.extend(answer.take().map(|answer| (answer, Err(error))));
            }
        }
        self.drop_answered();
        while self.waiting.front().is_some_and(|next| next.deadline <= now) {
            let next = self.waiting.pop_front().expect("the front was just seen");
            self.bytes -= cost(&next.item);
            completed.push((next.answer, Err(timed_out())));
        }
        completed
    }

    /// Drops a batch whose events all have a result: it is not sent again, and its number is never
    /// reused. A batch in flight stays, so that the next one waits for it.
    fn drop_answered(&mut self) {
        let answered = |batch: &Batch| batch.answers.iter().all(|(answer, _)| answer.is_none());
        if !self.in_flight
            && let Some(batch) = self.batch.take_if(|batch| answered(batch))
        {
            self.bytes -= batch.bytes();
        }
    }
}

impl Batch {
    fn bytes(&self) -> usize {
        self.items.iter().map(cost).sum()
    }

    /// Whether its items are messages for the inbox.
    pub fn is_inbox(&self) -> bool {
        self.items.first().is_some_and(|item| item.sender.is_some())
    }

    /// The idempotency key of its only event.
    pub fn key(&self) -> Option<&str> {
        self.items.first().and_then(|item| item.key.as_deref())
    }
}

fn timed_out() -> PublishError {
    PublishError::Rejected("the bus was unavailable for longer than --publish-timeout".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::event::ChannelName;
    use std::time::Duration;
    use tokio::sync::oneshot;

    fn publish(text: &str) -> (Publish, oneshot::Receiver<Result<PublishedId, PublishError>>) {
        let (answer, result) = oneshot::channel();
        let publish = Publish {
            channel: ChannelName::parse("c").unwrap(),
            sender: None,
            to: None,
            key: None,
            event: Bytes::copy_from_slice(text.as_bytes()),
            answer: Answer::Waiter(answer),
        };
        (publish, result)
    }

    /// An event whose first call had no reply and whose second is in flight, the last number used,
    /// and its result.
    fn retried() -> (PublishQueue, u64, oneshot::Receiver<Result<PublishedId, PublishError>>) {
        let (mut queue, mut number) = (PublishQueue::default(), 0);
        let (event, result) = publish("{}");
        queue.push(event, Instant::now());
        queue.call(EventId(5), &mut number);
        queue.retry(true);
        queue.call(EventId(5), &mut number);
        (queue, number, result)
    }

    fn send(completed: Vec<Completed>) {
        for (answer, result) in completed {
            let Answer::Waiter(waiter) = answer else { unreachable!() };
            let _ = waiter.send(result);
        }
    }

    #[test]
    fn id_becomes_the_last_member() {
        assert_eq!(&text_before_id(b"{}")[..], b"{\"id\":");
        assert_eq!(&text_before_id(b"{ }")[..], b"{ \"id\":");
        assert_eq!(&text_before_id(b"{\"a\":1}")[..], b"{\"a\":1,\"id\":");
    }

    #[test]
    fn events_during_a_call_share_the_next() {
        let (mut queue, mut number, now) = (PublishQueue::default(), 0, Instant::now());
        let (first, mut first_result) = publish("{}");
        queue.push(first, now);
        assert_eq!(queue.call(EventId(5), &mut number).unwrap().items.len(), 1);
        let mut results = Vec::new();
        for _ in 0..3 {
            let (next, result) = publish("{}");
            queue.push(next, now);
            results.push(result);
        }
        assert!(queue.call(EventId(5), &mut number).is_none());
        send(queue.on_published(Some(EventId(6))));
        assert_eq!(first_result.try_recv().unwrap(), Ok(EventId(6).into()));
        assert_eq!(queue.call(EventId(5), &mut number).unwrap().items.len(), 3);
        send(queue.on_published(Some(EventId(7))));
        let ids: Vec<_> = results.iter_mut().map(|result| result.try_recv().unwrap().unwrap()).collect();
        assert_eq!(ids, [7, 8, 9].map(|id| EventId(id).into()));
        assert!(queue.is_idle());
    }

    #[test]
    fn retry_keeps_number_and_base() {
        let (mut queue, mut number, now) = (PublishQueue::default(), 0, Instant::now());
        let (event, _result) = publish("{}");
        queue.push(event, now + Duration::from_secs(1));
        let first = queue.call(EventId(5), &mut number).unwrap().number;
        queue.retry(true);
        let again = queue.call(EventId(99), &mut number).unwrap();
        assert_eq!((again.number, again.base, again.retry), (first, EventId(5), true));
    }

    #[test]
    fn expired_events_are_rejected_or_unknown() {
        let (mut queue, mut number, now) = (PublishQueue::default(), 0, Instant::now());
        let ((sent, mut sent_result), (unsent, mut unsent_result)) = (publish("{}"), publish("{}"));
        queue.push(sent, now);
        queue.call(EventId(5), &mut number);
        queue.push(unsent, now);
        send(queue.expire(now));
        assert_eq!(sent_result.try_recv().unwrap(), Err(PublishError::Unknown));
        assert!(matches!(unsent_result.try_recv().unwrap(), Err(PublishError::Rejected(_))));
        queue.retry(true);
        assert!(queue.is_idle());
    }

    #[test]
    fn completed_events_hold_no_bytes() {
        let (mut queue, mut number, now) = (PublishQueue::default(), 0, Instant::now());
        for _ in 0..3 {
            queue.push(publish("{\"a\":1}").0, now);
        }
        assert!(queue.bytes() > 0);
        queue.call(EventId(5), &mut number);
        drop(queue.expire(now));
        queue.retry(true);
        assert_eq!(queue.bytes(), 0);
    }

    #[test]
    fn rejected_retry_is_unknown() {
        let (mut queue, _, mut result) = retried();
        send(queue.on_rejected("OOM".into()));
        assert_eq!(result.try_recv().unwrap(), Err(PublishError::Unknown));
    }

    #[test]
    fn withdrawn_retry_asks_for_the_outcome() {
        let (mut queue, mut number, mut result) = retried();
        send(queue.withdraw("too long".into()));
        let asks = queue.call(EventId(5), &mut number).unwrap();
        assert_eq!((asks.number, asks.withdrawn.is_some()), (1, true));
        send(queue.on_withdrawn());
        assert_eq!(result.try_recv().unwrap(), Err(PublishError::Rejected("too long".into())));
        assert!(queue.is_idle());
    }
}
