//! Tests that the checker finds a broken bus: a proxy between a node and its clients drops,
//! doubles, swaps or renumbers one event.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use crate::checker::Rule;
use crate::common::{Node, Nodes, Redis};
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::FLAGS;

/// What happens to the next event.
#[derive(Clone, Copy, Debug)]
enum Mutation {
    Drop,
    Double,
    Swap,
    /// Delivers it with the id of the event before it, which is dropped.
    ReuseId,
}

/// A proxy between a node and its clients.
#[derive(Default)]
struct Mutator {
    next: Mutex<Option<Mutation>>,
    done: AtomicU32,
}

impl Mutator {
    /// The next mutation, if there is one.
    fn take(&self) -> Option<Mutation> {
        let next = self.next.lock().expect("nothing panics while holding it").take();
        self.done.fetch_add(u32::from(next.is_some()), Ordering::SeqCst);
        next
    }

    async fn carry(self: Arc<Mutator>, listener: TcpListener, node: SocketAddr) {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(node).await else { continue };
            let ((mut from_client, to_client), (from_node, mut to_node)) =
                (client.into_split(), server.into_split());
            let mutator = self.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = tokio::io::copy(&mut from_client, &mut to_node) => {}
                    _ = mutator.down(from_node, to_client) => {}
                }
            });
        }
    }

    async fn down(&self, from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
        let mut from = BufReader::new(from);
        // The response to the upgrade.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(from.read_u8().await?);
        }
        to.write_all(&head).await?;
        if !head.starts_with(b"HTTP/1.1 101") {
            return tokio::io::copy(&mut from, &mut to).await.map(|_| ());
        }
        let mut seen = 0; // delivers some events first
        loop {
            let frame = read_frame(&mut from).await?;
            seen += u32::from(is_event(&frame));
            let what = if seen > 5 && is_event(&frame) { self.take() } else { None };
            match what {
                None => to.write_all(&frame).await?,
                Some(Mutation::Drop) => {}
                Some(Mutation::Double) => to.write_all(&[&frame[..], &frame[..]].concat()).await?,
                Some(Mutation::Swap | Mutation::ReuseId) => {
                    let mut between = Vec::new();
                    let next = loop {
                        let next = read_frame(&mut from).await?;
                        if is_event(&next) {
                            break next;
                        }
                        between.extend(next);
                    };
                    let both = match what {
                        Some(Mutation::Swap) => [next, between, frame].concat(),
                        _ => [between, with_id_of(&next, &frame)].concat(),
                    };
                    to.write_all(&both).await?;
                }
            }
        }
    }
}

/// One frame. Frames of servers are not masked (RFC 6455 section 5.2).
async fn read_frame(from: &mut BufReader<OwnedReadHalf>) -> std::io::Result<Vec<u8>> {
    let mut frame = vec![from.read_u8().await?, from.read_u8().await?];
    let length = match frame[1] {
        126 => {
            let length = from.read_u16().await?;
            frame.extend(length.to_be_bytes());
            length as usize
        }
        length if length < 126 => length as usize,
        _ => panic!("no event here is so long"),
    };
    let start = frame.len();
    frame.resize(start + length, 0);
    from.read_exact(&mut frame[start..]).await?;
    Ok(frame)
}

fn is_event(frame: &[u8]) -> bool {
    frame[0] == 0x81 && frame.windows(5).any(|part| part == b"\"id\":")
}

/// The same event with another id. Ids have 16 digits for the next two centuries.
fn with_id_of(event: &[u8], other: &[u8]) -> Vec<u8> {
    let (end, other_end) = (event.len() - 17, other.len() - 17);
    [&event[..end], &other[other_end..]].concat()
}

async fn is_caught(what: Mutation, rules: &[Rule]) {
    let redis = Redis::start(&[]).await;
    let mut node = Node::on(&redis, &FLAGS).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mutator = Arc::new(Mutator::default());
    let straight = node.public;
    node.public = listener.local_addr().expect("it is bound");
    let carrying = tokio::spawn(mutator.clone().carry(listener, straight));
    let nodes = Nodes::new([node]);
    for round in 0..3 {
        // No publishers over WebSocket: the test is about what subscribers see.
        let workload = Workload {
            users: 2,
            roamers: 0,
            clients: 0,
            programs: 2,
            seed: round,
            channel: format!("broken{round}"),
            ..Workload::default()
        };
        let run = Run::at(&nodes, 1, &redis, workload).await;
        run.wait_for_acks(50).await;
        *mutator.next.lock().expect("nothing panics while holding it") = Some(what);
        crate::common::until("the break", || async {
            (mutator.done.load(Ordering::SeqCst) == round as u32 + 1).then_some(())
        })
        .await;
        run.wait_for_acks(50).await;
        let violations = run.violations().await;
        assert!(
            violations.iter().any(|violation| rules.contains(&violation.rule)),
            "{what:?}: {violations:?}"
        );
    }
    carrying.abort();
}

#[tokio::test]
async fn checker_finds_a_dropped_event() {
    is_caught(Mutation::Drop, &[Rule::Missing]).await;
}

#[tokio::test]
async fn checker_finds_a_doubled_event() {
    is_caught(Mutation::Double, &[Rule::Twice]).await;
}

#[tokio::test]
async fn checker_finds_swapped_events() {
    is_caught(Mutation::Swap, &[Rule::Order]).await;
}

#[tokio::test]
async fn checker_finds_a_reused_id() {
    is_caught(Mutation::ReuseId, &[Rule::OneId]).await;
}
