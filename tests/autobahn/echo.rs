//! The server for the Autobahn suite: a real shard with a bus that sends every message back to its
//! channel unchanged, text or binary. So the suite tests the code that reads, answers, closes and
//! writes. `tests/autobahn.sh` starts it, and uses a separate channel for each of the suite's
//! connections.

#[allow(dead_code)] // tests use its second shard
#[path = "../common/single_shard.rs"]
mod single_shard;

use std::error::Error;
use std::io::{self, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Instant;

use fanfare::bus::{BusMessage, Publish, Request, ShardSender};
use fanfare::protocol::event::{Entry, EventId};
use fanfare::shard::mailbox::{MailboxSenders, ShardMessage};
use single_shard::SingleShard;
use tokio::sync::mpsc;

/// The suite sends messages of up to 16 MiB without a rate limit, and expects no pings.
const FLAGS: [&str; 12] = [
    "--shards",
    "1",
    "--max-message-size",
    "16MiB",
    "--buffer-memory",
    "64MiB",
    "--max-message-rate",
    "0",
    "--max-byte-rate",
    "0",
    "--ping-interval",
    "1h",
];

/// First byte of an unfragmented binary frame (RFC 6455 section 5.2).
const BINARY: u8 = 0x82;

/// What the shard makes of a text for the bus.
#[derive(serde::Deserialize)]
struct Chat {
    text: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let SingleShard { shards, asked, limits, .. } = SingleShard::start(&FLAGS, true)?;
    let bus = shards.clone();
    thread::spawn(|| echo(asked, bus));

    let listener = TcpListener::bind("127.0.0.1:0")?;
    writeln!(io::stdout(), "{}", listener.local_addr()?.port())?;
    loop {
        let (socket, peer) = listener.accept()?;
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let connection_slot = limits.acquire(peer.ip()).map_err(|_| "the suite has too many connections")?;
        shards.send(0, ShardMessage::Sockets(vec![(mio::net::TcpStream::from_std(socket), connection_slot)]));
    }
}

/// Runs the bus.
fn echo(mut asked: mpsc::UnboundedReceiver<Request>, shards: MailboxSenders) {
    let position = EventId(1); // events without id do not change it
    while let Some(request) = asked.blocking_recv() {
        match request {
            Request::Follow { channel, shard } => {
                shards.send(
                    shard,
                    BusMessage::Followed { channel, base: position, position, recent: Vec::new() },
                );
            }
            Request::Publish(Publish { channel, event, answer, .. }) => {
                let chat: Option<Chat> = event
                    .starts_with(br#"{"sender":"autobahn","text":"#)
                    .then(|| serde_json::from_slice(&event).expect("fanfare writes JSON"));
                let mut entry = Entry::without_id(
                    position,
                    chat.as_ref().map_or(&event[..], |chat| chat.text.as_bytes()),
                );
                if chat.is_none() {
                    let mut frame = entry.bytes.to_vec();
                    frame[0] = BINARY;
                    entry.bytes = frame.into();
                }
                shards.send(0, BusMessage::Entry { channel: channel.into(), entry, arrived: Instant::now() });
                shards.answer(answer, Ok(position.into()));
            }
            Request::Unfollow { .. }
            | Request::Read { .. }
            | Request::Refresh { .. }
            | Request::Order { .. }
            | Request::Presence { .. }
            | Request::FollowPresence { .. }
            | Request::ReadPresence { .. } => {}
        }
    }
}
