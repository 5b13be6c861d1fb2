//! A single shard, connected as in a node. The test is its bus. The unit tests of `src/shard/` use
//! this file as well.

use std::error::Error;
use std::sync::Arc;
use std::thread;

use fanfare::auth::keys::KeyRing;
use fanfare::bus::Request;
use fanfare::config::{Action, Settings};
use fanfare::limits::connections::ConnectionLimits;
use fanfare::metrics::{BusMetrics, Metrics, Readiness};
use fanfare::shard::mailbox::{Inbox, MailboxSenders};
use fanfare::shard::{self, ShardContext};
use fanfare::ws::handshake::HandshakeContext;
use tokio::sync::mpsc;

/// The other ends of a shard's connections.
pub struct SingleShard {
    /// Sends to the shard (number 0), and to a second one that does not exist.
    pub shards: MailboxSenders,
    /// Messages to the second shard.
    pub other: Inbox,
    /// Requests to the bus.
    pub asked: mpsc::UnboundedReceiver<Request>,
    pub metrics: Arc<Metrics>,
    pub limits: Arc<ConnectionLimits>,
}

impl SingleShard {
    /// Starts a shard with these settings.
    pub fn start(flags: &[&str], takes_binary: bool) -> Result<SingleShard, Box<dyn Error>> {
        let (single, context, inbox) = SingleShard::connect(flags, takes_binary)?;
        thread::spawn(|| shard::run(context, inbox).expect("epoll works"));
        Ok(single)
    }

    /// Builds all that a shard with these settings needs to run.
    pub fn connect(
        flags: &[&str],
        takes_binary: bool,
    ) -> Result<(SingleShard, ShardContext, Inbox), Box<dyn Error>> {
        let Ok(Action::Run(settings)) = Settings::from(flags.iter().map(Into::into), []) else {
            return Err("these settings should be good".into());
        };
        let (requests, asked) = mpsc::unbounded_channel();
        let numbers = Arc::new(BusMetrics::default());
        let metrics = Arc::new(Metrics::new(1, numbers, Arc::new(Readiness::default())));
        let (shards, inboxes) = MailboxSenders::new(2);
        let [inbox, other] = <[Inbox; 2]>::try_from(inboxes).map_err(|_| "two inboxes")?;
        let keys = Arc::new(KeyRing::load(&settings).map_err(|_| "there are no keys to load")?);
        let limits = Arc::new(ConnectionLimits::new(&settings));
        let readiness = metrics.readiness.clone();
        let handshake = HandshakeContext {
            settings: Arc::new(settings),
            readiness,
            keys,
            limits: limits.clone(),
            loopback: Arc::default(),
        };
        let context = ShardContext {
            id: 0,
            handshake,
            requests,
            shards: shards.clone(),
            metrics: metrics.clone(),
            unsent: Arc::default(),
            takes_binary,
        };
        Ok((SingleShard { shards, other, asked, metrics, limits }, context, inbox))
    }
}
