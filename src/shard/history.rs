//! Reading history from the bus for members that need it, to join or because the feed has left
//! them behind.

use std::sync::Arc;

use super::Shard;
use super::deferred::Pending;
use super::pages::PageCache;
use crate::bus::reads::Read;
use crate::bus::{BusError, ConnectionId, Page, PageReader, Request};
use crate::config::Settings;
use crate::protocol::event::EventId;
use crate::protocol::form::ChannelForm;

/// Members that read history.
#[derive(Debug)]
pub(super) struct ReplayQueue {
    /// The pages in memory, and the members that wait for others.
    pub pages: PageCache,
    /// Members whose page could not be read, or did not help them. They try again every second.
    failed: Vec<ConnectionId>,
    /// Members that reached the limit on history in one tick, or the limit on reads for their
    /// client.
    throttled: Vec<ConnectionId>,
}

impl ReplayQueue {
    pub fn new(settings: &Settings) -> ReplayQueue {
        let pages = PageCache::new(settings.page_memory(), settings.max_message_size);
        ReplayQueue { pages, failed: Vec::new(), throttled: Vec::new() }
    }
}

impl Shard {
    /// Makes a member wait for a page of history of about this many bytes, or for its turn among
    /// the members of its connection, or for the next tick if the limit on reads for its client is
    /// reached.
    pub(super) fn request_page(&mut self, number: u32, position: EventId, bytes: usize) {
        if !self.connections.may_read(number) {
            return self.connections.wait_for_page(number);
        }
        let limits = &self.context.handshake.limits;
        let now = limits.allowances.now();
        let owner = self.connections.owner(number);
        let connection = &mut self.connections[owner];
        if connection.allowance(limits).is_some_and(|client| !client.take_history(bytes, now)) {
            return self.throttle(number);
        }
        self.connections.wait_for_page(number);
        let key = self.connections.membership(number).channel;
        let (channel, id) = (self.channels[key].id, self.connections.id(number));
        self.replay.pages.wait(channel, position, bytes, id);
        self.start_reads();
    }

    /// Makes a member wait for the next tick.
    pub(super) fn throttle(&mut self, number: u32) {
        self.connections.wait_for_page(number);
        self.replay.throttled.push(self.connections.id(number));
    }

    /// Makes a member wait for the next second, since the last answer did not help it.
    pub(super) fn retry_page_later(&mut self, number: u32) {
        self.connections.wait_for_page(number);
        self.replay.failed.push(self.connections.id(number));
    }

    /// Resumes the next member of a connection that needs a page, unless another waits for one.
    pub(super) fn resume_next_reader(&mut self, owner: u32) {
        if let Some(number) = self.connections.next_reader(owner) {
            self.deferred.answered.push_back((self.connections.id(number), Pending::Nothing));
        }
    }

    /// Resumes the members that wait for a tick.
    pub(super) fn resume_throttled(&mut self) {
        let throttled = self.replay.throttled.drain(..).map(|id| (id, Pending::Nothing));
        self.deferred.answered.extend(throttled);
    }

    /// Resumes the members that wait for the next second.
    pub(super) fn resume_failed(&mut self) {
        let failed = self.replay.failed.drain(..).map(|id| (id, Pending::Nothing));
        self.deferred.answered.extend(failed);
    }

    /// Asks the bus for the pages that are next, as far as there is memory for them.
    pub(super) fn start_reads(&mut self) {
        let connections = &self.connections;
        let waits =
            |id: &ConnectionId| connections.find(*id).is_some_and(|number| connections.awaits_page(number));
        while let Some(Read { channel, position, bytes }) = self.replay.pages.start(waits) {
            let channel = self.channels[channel.key].name.clone();
            let reader = PageReader::Shard(self.context.id, channel.form);
            self.request_bus(Request::Read { channel: channel.name, position, bytes, reader });
        }
    }

    pub(super) fn on_page(
        &mut self,
        name: &ChannelForm,
        position: EventId,
        result: Result<Arc<Page>, BusError>,
    ) {
        let Some(key) = self.channels.key(name) else { return };
        let channel = &self.channels[key];
        match result {
            Err(why) => {
                for id in self.replay.pages.fail(channel.id, position) {
                    let Some(number) = self.connections.find(id) else { continue };
                    match self.connections.is_joining(number) {
                        true => self.reject_join(number, &why),
                        false => self.replay.failed.push(id),
                    }
                }
            }
            Ok(page) => {
                let Some(feed) = &channel.feed else { return }; // a channel that was dropped and added again
                let (page, served) =
                    self.replay.pages.add(channel.id, position, &page, &channel.name, feed, self.tick);
                self.deferred.answered.extend(served.into_iter().map(|id| (id, Pending::Page(page))));
            }
        }
        self.start_reads();
    }
}
