//! Faults of every kind at random moments, for as long as one likes, in the middle of a crowd's work; the judge speaks
//! every minute or so. `SOAK_SECONDS` says how long (20 when it says nothing; `tests/run.sh` takes two minutes, or what
//! its `--soak` says), `SOAK_SEED` which faults: the seed is printed, and gives the same faults again, though not to the
//! millisecond.

use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

use tokio::time::sleep;

use crate::common::stream::Dice;
use crate::common::{Redis, Silence};
use crate::workload::crowd::{Crowd, Run};
use crate::workload::world::World;

/// How long one crowd works before it is judged: what it noted must fit into memory.
const ROUND: Duration = Duration::from_secs(60);

/// How many kinds of faults there are.
const FAULTS: u64 = 20;

/// Says something at once, also where a test's output is kept back until it fails.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}"); // who can't hear it can't be helped
}

/// Says how to have the same again, below all that a failure prints.
struct Again(u64);

impl Drop for Again {
    fn drop(&mut self) {
        if std::thread::panicking() {
            say(&format!(
                "soak: failed. The same faults again: SOAK_SEED={} tests/run.sh --soak SECONDS soak::",
                self.0
            ));
        }
    }
}

/// Lets one thing go wrong, and right again.
async fn fault(world: &mut World, run: &Run, dice: &mut Dice) -> String {
    let place = dice.below(2) as usize;
    // Most faults are short; one in four may outlast every patience of a node. It is what is tested.
    let most = if dice.below(4) == 0 { 7000 } else { 1500 };
    let time = Duration::from_millis(100 + dice.below(most));
    let kind = dice.below(FAULTS);
    let way = &world.ways[place];
    let call = async |world: &World, command: &[&str]| {
        world.redis.client().await.call(command).await;
    };
    let what = match kind {
        0 => {
            world.redis.kill();
            sleep(time).await;
            world.redis.up().await;
            "Redis dies and comes back with what it has on disk"
        }
        1 => {
            world.redis.kill();
            world.redis.wipe();
            sleep(time).await;
            world.redis.up().await;
            "Redis dies and comes back empty"
        }
        2 => {
            call(world, &["FLUSHALL"]).await;
            "all is flushed"
        }
        3 => {
            world.redis.freeze();
            sleep(time).await;
            world.redis.thaw();
            "Redis hangs"
        }
        4 => {
            way.cut();
            "connections are cut"
        }
        5 => {
            way.hold_messages(true);
            sleep(time).await;
            way.cut();
            way.hold_messages(false);
            "messages are lost"
        }
        6 => {
            way.hold_messages(true);
            sleep(time).await;
            way.hold_messages(false);
            "messages are late"
        }
        7 => {
            let silence = match dice.below(3) {
                0 => Silence { up: true, down: true },
                1 => Silence { up: true, down: false },
                _ => Silence { up: false, down: true },
            };
            way.silence(silence);
            sleep(time).await;
            way.silence(Silence::default());
            "a network carries nothing"
        }
        8 => {
            way.strand();
            "connections hang for ever"
        }
        9 => {
            way.strand_subscribers();
            "subscriptions hang for ever"
        }
        10 => {
            let which = ["pubsub", "normal"][dice.below(2) as usize];
            call(world, &["CLIENT", "KILL", "TYPE", which]).await;
            "Redis throws clients out"
        }
        11 => {
            world.nodes.get(place).kill();
            world.replace(place).await;
            "a node dies and another takes its place"
        }
        12 => {
            let old = world.nodes.get(place);
            old.signal("TERM");
            assert!(old.ended().await.success(), "it ends in order");
            world.replace(place).await;
            "a node is restarted"
        }
        13 => {
            call(world, &["CONFIG", "SET", "maxmemory", "1"]).await;
            sleep(time).await;
            call(world, &["CONFIG", "SET", "maxmemory", "0"]).await;
            "Redis is full"
        }
        14 => {
            call(world, &["ACL", "SETUSER", "default", "resetchannels"]).await;
            sleep(time).await;
            call(world, &["ACL", "SETUSER", "default", "allchannels"]).await;
            "subscriptions are refused"
        }
        15 => {
            way.lose_answer_to(r#""text":"#).await;
            "an answer is lost"
        }
        16 => {
            way.delay(Duration::from_millis(50));
            sleep(time).await;
            way.delay(Duration::ZERO);
            "Redis is far away"
        }
        17 => {
            let events = format!("fanfare:{{{}}}:events", run.shared.channel);
            call(world, [&["DEL", &events][..], &["XTRIM", &events, "MAXLEN", "3"]][dice.below(2) as usize])
                .await;
            "history is deleted"
        }
        18 => {
            call(world, &["SCRIPT", "FLUSH"]).await;
            "scripts are flushed"
        }
        _ => {
            failover(world, run).await;
            "a replica takes over that has not everything"
        }
    };
    format!("{what} ({time:?}, node {place})")
}

/// A replica is cut off, promoted, and takes over; the old primary is gone before anyone comes to the new one, so that
/// there are never two.
async fn failover(world: &mut World, run: &Run) {
    let mut replica = Redis::replica_of(&world.redis).await;
    replica.promote().await;
    sleep(Duration::from_millis(200)).await; // what is acknowledged meanwhile is lost
    world.redis.kill();
    run.programs_go_to(&replica);
    for way in &world.ways {
        way.lead_to(replica.port());
    }
    world.redis = replica;
}

#[tokio::test]
async fn faults_at_random_for_a_while() {
    let _alone = crate::alone().await;
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let length = Duration::from_secs(number("SOAK_SECONDS").unwrap_or(20));
    let clock =
        || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_micros() as u64;
    let seed = number("SOAK_SEED").unwrap_or_else(|| clock() % 1_000_000);
    say(&format!("soak: {length:?} with SOAK_SEED={seed}"));
    let _again = Again(seed);
    let mut dice = Dice(seed);
    let (start, mut faults, mut acked, mut told) = (Instant::now(), 0, 0, 0);
    let redis = Redis::start(&["--appendonly", "yes", "--maxmemory-policy", "noeviction"]).await;
    // Hardly a second of events in memory: whoever stalls or stays away reads history.
    let flags = ["--publish-timeout", "3s", "--buffer-memory", "64KiB"];
    let mut world = World::on(redis, &flags).await;
    for round in 0.. {
        let left = length.saturating_sub(start.elapsed());
        if left.is_zero() {
            break;
        }
        let crowd = Crowd {
            seed: seed + round,
            roamers: 6,
            slow: 3,
            channel: format!("soak{round}"),
            ..Crowd::default()
        };
        let run = Run::start(&world, crowd).await;
        let began = Instant::now();
        while began.elapsed() < left.min(ROUND) {
            let what = fault(&mut world, &run, &mut dice).await;
            faults += 1;
            say(&format!("soak: {:4} s, fault {faults}: {what}", start.elapsed().as_secs()));
            if dice.below(3) > 0 {
                run.flows().await; // the others follow one another at once
            }
        }
        world.ready().await;
        let verdict = run.end().await;
        acked += verdict.acked();
        told += verdict.told();
    }
    say(&format!("soak: {faults} faults, {acked} events acknowledged, {told} times a client was told"));
    assert!(acked > 100);
}
