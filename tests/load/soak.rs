//! Faults of every kind, one after the other, while clients subscribe and publish; the checker runs
//! about once a minute. Every kind happens once, in a random order; then they are random until
//! `SOAK_SECONDS` are over (20 by default; `tests/run.sh` sets two minutes, or the value of its
//! `--soak`). `SOAK_SEED` chooses order and moments: the seed is printed, and repeats the same
//! faults, though not to the millisecond.

use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use tokio::time::sleep;

use crate::common::{Client, Options, Redis, Rng, Silence, until};
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::Testbed;

/// How long a workload runs until it is checked: its records must fit into memory.
const ROUND: Duration = Duration::from_secs(60);

/// The number of kinds of faults.
const FAULTS: u64 = 20;

/// Prints at once, although libtest captures the output of tests.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}"); // stderr may be closed
}

/// Prints how to repeat the faults, at the end of a failure's output.
struct RepeatHint(u64);

impl Drop for RepeatHint {
    fn drop(&mut self) {
        if std::thread::panicking() {
            say(&format!(
                "soak: failed. The same faults again: SOAK_SEED={} tests/run.sh --soak SECONDS soak::",
                self.0
            ));
        }
    }
}

/// Injects a fault of this kind, and ends it.
async fn fault(testbed: &mut Testbed, run: &Run, kind: u64, rng: &mut Rng) -> String {
    let place = rng.below(2) as usize;
    // Most faults are short. One in four may outlast all timeouts of a node.
    let most = if rng.below(4) == 0 { 7000 } else { 1500 };
    let time = Duration::from_millis(100 + rng.below(most));
    let proxy = &testbed.proxies[place];
    let call = async |testbed: &Testbed, command: &[&str]| {
        testbed.redis.client().await.call(command).await;
    };
    let what = match kind {
        0 => {
            testbed.redis.kill();
            sleep(time).await;
            testbed.redis.up().await;
            "Redis dies and comes back with what it has on disk"
        }
        1 => {
            testbed.redis.kill();
            testbed.redis.wipe();
            sleep(time).await;
            testbed.redis.up().await;
            "Redis dies and comes back empty"
        }
        2 => {
            call(testbed, &["FLUSHALL"]).await;
            "all is flushed"
        }
        3 => {
            testbed.redis.freeze();
            sleep(time).await;
            testbed.redis.thaw();
            "Redis hangs"
        }
        4 => {
            proxy.cut();
            "connections are cut"
        }
        5 => {
            proxy.hold_messages(true);
            sleep(time).await;
            proxy.cut();
            proxy.hold_messages(false);
            "messages are lost"
        }
        6 => {
            proxy.hold_messages(true);
            sleep(time).await;
            proxy.hold_messages(false);
            "messages are late"
        }
        7 => {
            let silence = match rng.below(3) {
                0 => Silence { up: true, down: true },
                1 => Silence { up: true, down: false },
                _ => Silence { up: false, down: true },
            };
            proxy.silence(silence);
            sleep(time).await;
            proxy.silence(Silence::default());
            "a network carries nothing"
        }
        8 => {
            proxy.strand();
            "connections hang for ever"
        }
        9 => {
            proxy.strand_subscribers();
            "subscriptions hang for ever"
        }
        10 => {
            let which = ["pubsub", "normal"][rng.below(2) as usize];
            call(testbed, &["CLIENT", "KILL", "TYPE", which]).await;
            "Redis throws clients out"
        }
        11 => {
            testbed.nodes.get(place).kill();
            testbed.replace(place).await;
            "a node dies and another takes its place"
        }
        12 => {
            let old = testbed.nodes.get(place);
            old.signal("TERM");
            assert!(old.ended().await.success(), "it ends in order");
            testbed.replace(place).await;
            "a node is restarted"
        }
        13 => {
            call(testbed, &["CONFIG", "SET", "maxmemory", "1"]).await;
            sleep(time).await;
            call(testbed, &["CONFIG", "SET", "maxmemory", "0"]).await;
            "Redis is full"
        }
        14 => {
            call(testbed, &["ACL", "SETUSER", "default", "resetchannels"]).await;
            sleep(time).await;
            call(testbed, &["ACL", "SETUSER", "default", "allchannels"]).await;
            "subscriptions are rejected"
        }
        15 => {
            proxy.lose_answer_to(r#""text":"#).await;
            "an answer is lost"
        }
        16 => {
            proxy.delay(Duration::from_millis(50));
            sleep(time).await;
            proxy.delay(Duration::ZERO);
            "Redis is far away"
        }
        17 => {
            let events = format!("fanfare:{{{}}}:events", run.shared.main().name);
            call(testbed, [&["DEL", &events][..], &["XTRIM", &events, "MAXLEN", "3"]][rng.below(2) as usize])
                .await;
            "history is deleted"
        }
        18 => {
            call(testbed, &["SCRIPT", "FLUSH"]).await;
            "scripts are flushed"
        }
        _ => {
            failover(testbed, run).await;
            "a replica takes over that has not everything"
        }
    };
    format!("{what} ({time:?}, node {place})")
}

/// A replica is disconnected, promoted, and takes over. The old primary is killed before any client
/// uses the new one, so that there are never two.
async fn failover(testbed: &mut Testbed, run: &Run) {
    let mut replica = Redis::replica_of(&testbed.redis).await;
    replica.promote().await;
    sleep(Duration::from_millis(200)).await; // events acknowledged meanwhile are lost
    testbed.redis.kill();
    run.connect_programs(&replica);
    for proxy in &testbed.proxies {
        proxy.lead_to(replica.port());
    }
    testbed.redis = replica;
}

#[tokio::test]
async fn random_faults() {
    let _alone = crate::alone().await;
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let length = Duration::from_secs(number("SOAK_SECONDS").unwrap_or(20));
    let clock =
        || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_micros() as u64;
    let seed = number("SOAK_SEED").unwrap_or_else(|| clock() % 1_000_000);
    say(&format!("soak: {length:?} with SOAK_SEED={seed}"));
    let _hint = RepeatHint(seed);
    let mut rng = Rng(seed);
    let (start, mut faults, mut acked, mut losses) = (Instant::now(), 0, 0, 0);
    let redis = Redis::start(&["--appendonly", "yes", "--maxmemory-policy", "noeviction"]).await;
    // Less than a second of events in memory, so that slow and disconnected clients read history.
    let flags = ["--publish-timeout", "3s", "--buffer-memory", "64KiB"];
    let mut testbed = Testbed::on(redis, &flags).await;
    let mut kinds: Vec<u64> = (0..FAULTS).collect();
    for round in 0.. {
        if start.elapsed() > length && kinds.is_empty() {
            break;
        }
        let workload = Workload {
            seed: seed + round,
            users: 2,
            roamers: 12,
            slow: 3,
            channel: format!("soak{round}"),
            channels: [5, 50][round as usize % 2],
            ..Workload::default()
        };
        let run = Run::start(&testbed, workload).await;
        let began = Instant::now();
        while began.elapsed() < ROUND && (start.elapsed() < length || !kinds.is_empty()) {
            let kind = match kinds.len() {
                0 => rng.below(FAULTS),
                left => kinds.swap_remove(rng.index(left)),
            };
            let what = fault(&mut testbed, &run, kind, &mut rng).await;
            faults += 1;
            say(&format!("soak: {:4} s, fault {faults}: {what}", start.elapsed().as_secs()));
            if rng.below(3) > 0 {
                run.wait_for_delivery().await; // otherwise the next fault follows at once
            }
        }
        testbed.ready().await;
        let report = run.end().await;
        acked += report.acked();
        losses += report.losses_reported();
    }
    say(&format!("soak: {faults} faults, {acked} events acknowledged, {losses} losses reported"));
    assert!(acked > 100);
    // After all faults a plain client on one node gets an event of the other.
    let options = Options { query: "channel=after".into(), ..Options::default() };
    let node = testbed.nodes.get(0);
    let join = || async { Client::try_open(node.public, "last", &options).await.ok() };
    let mut client = until("a join", join).await;
    testbed.nodes.get(1).ready().await;
    let id = testbed.nodes.get(1).publish("after", &json!({"n": 1})).await;
    let event = loop {
        match client.next_json().await {
            ping if ping["type"] == "ping" => {}
            event => break event,
        }
    };
    assert_eq!(event, json!({"n": 1, "id": id}));
}
