//! `GET /history`: events of a channel from history, page by page.

use std::fmt::Write;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Shared, query};
use crate::bus::{BusError, Page, PageReader, Request, is_continuous};
use crate::http::{self, Rejection};
use crate::protocol::event::{ChannelName, EventId};

/// Soft limit of the events in a response, in bytes.
const BYTES_MAX: usize = 256 * 1024;

/// Most reads for one response: 1,000 events are in at most five pages, and one or two more reads
/// find the first.
const READS_MAX: usize = 10;

/// Which events to send.
#[derive(Debug)]
pub(super) struct HistoryQuery {
    channel: ChannelName,
    /// Without it the newest events are sent.
    after: Option<EventId>,
    limit: usize,
}

impl HistoryQuery {
    pub fn parse(query: &str) -> Result<HistoryQuery, Rejection> {
        query::check_names(query, &["channel", "after", "limit"])?;
        let after = http::query_value(query, "after")?.map(|given| {
            let id = EventId::parse(given.as_bytes());
            id.ok_or_else(|| Rejection::new(400, "after must be the id of an event"))
        });
        Ok(HistoryQuery {
            channel: http::query_channel(query)?,
            after: after.transpose()?,
            limit: query::limit(query)?,
        })
    }

    /// Reads the events. The response is JSON.
    pub async fn answer(&self, shared: &Shared) -> Result<String, BusError> {
        let mut events = Events { position: self.after.unwrap_or_default(), count: 0, json: String::new() };
        let mut page = self.read(events.position, BYTES_MAX, shared).await?;
        if self.after.is_none() {
            events.position = EventId(page.head.0.saturating_sub(self.limit as u64));
        }
        let mut recovered = true;
        for _ in 1..READS_MAX {
            let Page { base, head, oldest, .. } = *page;
            if events.count == 0 {
                recovered = self.after.is_none_or(|after| is_continuous(after, base, head, oldest));
                let start = oldest.previous().max(base);
                // A position that is not continuous says nothing about the events from here on.
                let position = if recovered { events.position.max(start) } else { start };
                events.position = position.min(head);
            } else if !is_continuous(events.position, base, head, oldest) {
                break; // trimmed meanwhile, or lost: the answer to the next request says so
            }
            events.take(&page, self.limit);
            let bytes = BYTES_MAX.saturating_sub(events.json.len());
            if events.count >= self.limit || bytes == 0 || events.position >= head {
                break;
            }
            page = self.read(events.position, bytes, shared).await?;
        }
        let Page { base, head, oldest, .. } = *page;
        let Events { position: next, json, .. } = events;
        Ok(format!(
            r#"{{"events":[{json}],"next":{next},"head":{head},"oldest":{oldest},"base":{base},"recovered":{recovered}}}"#
        ))
    }

    async fn read(&self, position: EventId, bytes: usize, shared: &Shared) -> Result<Arc<Page>, BusError> {
        let (waiter, page) = oneshot::channel();
        let (channel, reader) = (self.channel.clone(), PageReader::Waiter(waiter));
        let _ = shared.context.requests.send(Request::Read { channel, position, bytes, reader });
        page.await.unwrap_or_else(|_| Err(BusError::Unavailable("this node is stopping".into())))
    }
}

/// Events read so far.
#[derive(Debug)]
struct Events {
    /// The position after them.
    position: EventId,
    count: usize,
    /// The events, separated by commas.
    json: String,
}

impl Events {
    /// Takes the events after the position, up to the limits.
    fn take(&mut self, page: &Page, limit: usize) {
        let rest: Vec<_> = page.entries.iter().filter_map(|entry| entry.after(self.position)).collect();
        if rest.first().is_none_or(|entry| entry.before() != self.position) {
            return; // they are in another page
        }
        for text in rest.iter().flat_map(|entry| entry.texts()) {
            if self.count >= limit || self.json.len() >= BYTES_MAX {
                break;
            }
            let comma = if self.count > 0 { "," } else { "" };
            let _ = write!(self.json, "{comma}{}", String::from_utf8_lossy(text)); // never fails
            self.count += 1;
            self.position = self.position.next();
        }
    }
}
