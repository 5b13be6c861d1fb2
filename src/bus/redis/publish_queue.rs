//! The events of one channel on their way to Redis: one call in flight, what arrives meanwhile gathers for the
//! next, in order. It knows neither sockets nor clocks: time is handed in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::bus::{Answer, Publish, PublishError};
use crate::protocol::event::EventId;

/// Events in one call. More would keep Redis from others for longer than ten milliseconds.
const BATCH_EVENTS: usize = 512;

/// Bytes in one call, unless a single event has more.
const BATCH_BYTES: usize = 1 << 20;

/// An event that waits for its turn.
#[derive(Debug)]
struct Waiting {
    item: Bytes,
    to: Option<Arc<str>>,
    key: Option<Arc<str>>,
    answer: Answer,
    deadline: Instant,
}

/// One numbered call.
#[derive(Debug)]
pub struct Batch {
    /// Its number, unique and rising in this process.
    pub number: u64,
    /// The channel's base when it was first sent.
    pub base: EventId,
    /// An earlier attempt may have reached Redis.
    pub retry: bool,
    /// Why Redis refused a retry before it ran. The next call sends no events and asks for the outcome of the attempt before.
    pub withdrawn: Option<Arc<str>>,
    /// The idempotency key of its only event.
    pub key: Option<Arc<str>>,
    /// Texts up to the id's digits, and whom they are for.
    pub items: Vec<(Bytes, Option<Arc<str>>)>,
    /// Who waits, and until when; `None` once answered.
    answers: Vec<(Option<Answer>, Instant)>,
}

/// An answer that is due.
pub type Due = (Answer, Result<EventId, PublishError>);

/// One channel's queue.
#[derive(Debug, Default)]
pub struct Publisher {
    waiting: VecDeque<Waiting>,
    batch: Option<Batch>,
    calling: bool,
    bytes: usize,
}

/// What an event that waits takes beside its text, about: its places in the queue, its channel, who wants to know.
const EVENT_OVERHEAD: usize = 256;

fn cost(item: &Bytes) -> usize {
    item.len() + EVENT_OVERHEAD
}

/// An event's text as the script wants it: up to the digits of the id, which is the last member.
fn item(event: &[u8]) -> Bytes {
    let open = event.strip_suffix(b"}").unwrap_or(event);
    let empty = open.iter().skip(1).all(u8::is_ascii_whitespace);
    let mut item = Vec::with_capacity(event.len() + 6);
    item.extend_from_slice(open);
    item.extend_from_slice(if empty { b"\"id\":" } else { b",\"id\":" });
    item.into()
}

impl Publisher {
    /// Whether nothing waits and nothing is in flight.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.batch.is_none() && !self.calling
    }

    /// How much memory its events take, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes an event in.
    pub fn push(&mut self, publish: Publish, deadline: Instant) {
        let item = item(&publish.event);
        self.bytes += cost(&item);
        self.waiting.push_back(Waiting {
            item,
            to: publish.to,
            key: publish.key,
            answer: publish.answer,
            deadline,
        });
    }

    /// Whether a call could go out now.
    pub fn is_ready(&self) -> bool {
        !self.calling && (self.batch.is_some() || !self.waiting.is_empty())
    }

    /// The call to make now: the one that has no answer yet, else a new one under the number that `number` gives.
    /// It ends with [`Publisher::taken`], [`Publisher::refused`] or [`Publisher::lost`].
    pub fn call(&mut self, base: EventId, number: &mut u64) -> Option<&Batch> {
        if !self.is_ready() {
            return None;
        }
        if self.batch.is_none() {
            *number += 1;
            self.batch = Some(self.gather(base, *number));
        }
        self.calling = true;
        self.batch.as_ref()
    }

    fn gather(&mut self, base: EventId, number: u64) -> Batch {
        let (items, answers) = (Vec::new(), Vec::new());
        let mut batch = Batch { number, base, retry: false, withdrawn: None, key: None, items, answers };
        let mut bytes = 0;
        while let Some(next) = self.waiting.front() {
            bytes += next.item.len();
            // An event with a key gets its own call, since its id may be an earlier one.
            let is_full = batch.items.len() == BATCH_EVENTS || bytes > BATCH_BYTES || batch.key.is_some();
            if !batch.items.is_empty() && (is_full || next.key.is_some()) {
                break;
            }
            let next = self.waiting.pop_front().expect("it has a front");
            batch.key = next.key;
            batch.items.push((next.item, next.to));
            batch.answers.push((Some(next.answer), next.deadline));
        }
        batch
    }

    /// Redis took the call: ids from `first` on. `None`: it may or may not have taken it, and won't any more.
    pub fn taken(&mut self, first: Option<EventId>) -> Vec<Due> {
        self.end(|at| match first {
            Some(first) => Ok(EventId(first.0 + at)),
            None => Err(PublishError::Unknown),
        })
    }

    /// Redis certainly did not take the call this time.
    pub fn refused(&mut self, why: Arc<str>) -> Vec<Due> {
        let earlier = self.batch.as_ref().is_some_and(|batch| batch.retry);
        self.end(|_| match earlier {
            true => Err(PublishError::Unknown), // an earlier attempt may have come through
            false => Err(PublishError::Refused(why.clone())),
        })
    }

    /// Redis refused the call and always will. If an earlier attempt had no answer, the next call asks for its outcome.
    pub fn withdraw(&mut self, why: Arc<str>) -> Vec<Due> {
        match &mut self.batch {
            Some(batch) if batch.retry => {
                batch.withdrawn = Some(why);
                self.calling = false;
                self.drop_answered();
                Vec::new()
            }
            _ => self.refused(why),
        }
    }

    /// Redis answered that no attempt was published.
    pub fn withdrew(&mut self) -> Vec<Due> {
        let why = self.batch.as_ref().and_then(|batch| batch.withdrawn.clone());
        self.end(|_| Err(PublishError::Refused(why.clone().unwrap_or_default())))
    }

    /// Refuses the events that wait for their first call.
    pub fn refuse_unsent(&mut self, why: &Arc<str>) -> Vec<Due> {
        let waiting = std::mem::take(&mut self.waiting);
        self.bytes -= waiting.iter().map(|event| cost(&event.item)).sum::<usize>();
        waiting.into_iter().map(|event| (event.answer, Err(PublishError::Refused(why.clone())))).collect()
    }

    /// No answer came: the same call is to be made again. `sent`: it may have reached Redis.
    pub fn lost(&mut self, sent: bool) {
        self.calling = false;
        if let Some(batch) = &mut self.batch {
            batch.retry |= sent;
        }
        self.drop_answered();
    }

    fn end(&mut self, result: impl Fn(u64) -> Result<EventId, PublishError>) -> Vec<Due> {
        self.calling = false;
        let Some(batch) = self.batch.take() else { return Vec::new() };
        self.bytes -= batch.bytes();
        let answers = batch.answers.into_iter().enumerate();
        answers.filter_map(|(at, (answer, _))| Some((answer?, result(at as u64)))).collect()
    }

    /// What can't wait any longer: never sent means refused, sent and unanswered means unknown.
    pub fn expire(&mut self, now: Instant) -> Vec<Due> {
        let mut due = Vec::new();
        if let Some(batch) = &mut self.batch {
            let sent = batch.retry || self.calling;
            for (answer, _) in batch.answers.iter_mut().filter(|(_, deadline)| *deadline <= now) {
                let error = if sent { PublishError::Unknown } else { not_in_time() };
                due.extend(answer.take().map(|answer| (answer, Err(error))));
            }
        }
        self.drop_answered();
        while self.waiting.front().is_some_and(|next| next.deadline <= now) {
            let next = self.waiting.pop_front().expect("it has a front");
            self.bytes -= cost(&next.item);
            due.push((next.answer, Err(not_in_time())));
        }
        due
    }

    /// A call that nobody waits for is not made again, and its number never used again. While it is in flight it
    /// stays, so that the next waits for its end.
    fn drop_answered(&mut self) {
        let answered = |batch: &Batch| batch.answers.iter().all(|(answer, _)| answer.is_none());
        if !self.calling
            && let Some(batch) = self.batch.take_if(|batch| answered(batch))
        {
            self.bytes -= batch.bytes();
        }
    }
}

impl Batch {
    fn bytes(&self) -> usize {
        self.items.iter().map(|(item, _)| cost(item)).sum()
    }
}

fn not_in_time() -> PublishError {
    PublishError::Refused("the bus could not be reached in time".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::event::ChannelName;
    use std::time::Duration;
    use tokio::sync::oneshot;

    fn publish(text: &str) -> (Publish, oneshot::Receiver<Result<EventId, PublishError>>) {
        let (answer, result) = oneshot::channel();
        let publish = Publish {
            channel: ChannelName::parse("c").unwrap(),
            to: None,
            key: None,
            event: Bytes::copy_from_slice(text.as_bytes()),
            answer: Answer::Waiter(answer),
        };
        (publish, result)
    }

    /// An event whose first call was lost and whose second is under way, the last number given, and its result.
    fn retried() -> (Publisher, u64, oneshot::Receiver<Result<EventId, PublishError>>) {
        let (mut publisher, mut number) = (Publisher::default(), 0);
        let (event, result) = publish("{}");
        publisher.push(event, Instant::now());
        publisher.call(EventId(5), &mut number);
        publisher.lost(true);
        publisher.call(EventId(5), &mut number);
        (publisher, number, result)
    }

    fn settle(due: Vec<Due>) {
        for (answer, result) in due {
            let Answer::Waiter(waiter) = answer else { unreachable!() };
            let _ = waiter.send(result);
        }
    }

    #[test]
    fn the_id_becomes_the_last_member() {
        assert_eq!(&item(b"{}")[..], b"{\"id\":");
        assert_eq!(&item(b"{ }")[..], b"{ \"id\":");
        assert_eq!(&item(b"{\"a\":1}")[..], b"{\"a\":1,\"id\":");
    }

    #[test]
    fn what_arrives_during_a_call_gathers_for_the_next() {
        let (mut publisher, mut number, now) = (Publisher::default(), 0, Instant::now());
        let (first, mut first_result) = publish("{}");
        publisher.push(first, now);
        assert_eq!(publisher.call(EventId(5), &mut number).unwrap().items.len(), 1);
        let mut results = Vec::new();
        for _ in 0..3 {
            let (next, result) = publish("{}");
            publisher.push(next, now);
            results.push(result);
        }
        assert!(publisher.call(EventId(5), &mut number).is_none());
        settle(publisher.taken(Some(EventId(6))));
        assert_eq!(first_result.try_recv().unwrap(), Ok(EventId(6)));
        assert_eq!(publisher.call(EventId(5), &mut number).unwrap().items.len(), 3);
        settle(publisher.taken(Some(EventId(7))));
        let ids: Vec<_> = results.iter_mut().map(|result| result.try_recv().unwrap().unwrap().0).collect();
        assert_eq!(ids, [7, 8, 9]);
        assert!(publisher.is_idle());
    }

    #[test]
    fn a_lost_call_is_made_again_under_its_number_and_base() {
        let (mut publisher, mut number, now) = (Publisher::default(), 0, Instant::now());
        let (event, _result) = publish("{}");
        publisher.push(event, now + Duration::from_secs(1));
        let first = publisher.call(EventId(5), &mut number).unwrap().number;
        publisher.lost(true);
        let again = publisher.call(EventId(99), &mut number).unwrap();
        assert_eq!((again.number, again.base, again.retry), (first, EventId(5), true));
    }

    #[test]
    fn time_running_out_is_refused_when_never_sent_and_unknown_when_sent() {
        let (mut publisher, mut number, now) = (Publisher::default(), 0, Instant::now());
        let ((sent, mut sent_result), (unsent, mut unsent_result)) = (publish("{}"), publish("{}"));
        publisher.push(sent, now);
        publisher.call(EventId(5), &mut number);
        publisher.push(unsent, now);
        settle(publisher.expire(now));
        assert_eq!(sent_result.try_recv().unwrap(), Err(PublishError::Unknown));
        assert!(matches!(unsent_result.try_recv().unwrap(), Err(PublishError::Refused(_))));
        publisher.lost(true);
        assert!(publisher.is_idle());
    }

    #[test]
    fn what_is_answered_holds_no_bytes() {
        let (mut publisher, mut number, now) = (Publisher::default(), 0, Instant::now());
        for _ in 0..3 {
            publisher.push(publish("{\"a\":1}").0, now);
        }
        assert!(publisher.bytes() > 0);
        publisher.call(EventId(5), &mut number);
        drop(publisher.expire(now));
        publisher.lost(true);
        assert_eq!(publisher.bytes(), 0);
    }

    #[test]
    fn a_refusal_of_a_retry_leaves_the_fate_unknown() {
        let (mut publisher, _, mut result) = retried();
        settle(publisher.refused("OOM".into()));
        assert_eq!(result.try_recv().unwrap(), Err(PublishError::Unknown));
    }

    #[test]
    fn a_refused_retry_asks_for_the_first_outcome() {
        let (mut publisher, mut number, mut result) = retried();
        settle(publisher.withdraw("too long".into()));
        let asks = publisher.call(EventId(5), &mut number).unwrap();
        assert_eq!((asks.number, asks.withdrawn.is_some()), (1, true));
        settle(publisher.withdrew());
        assert_eq!(result.try_recv().unwrap(), Err(PublishError::Refused("too long".into())));
        assert!(publisher.is_idle());
    }
}
