use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// The text of an event tells its run, so that an event of another run with the same id would show.
fn text(run: u64, id: u64) -> String {
    format!(r#"{{"run":{run},"id":{id}}}"#)
}

fn entry(run: u64, first: u64, count: u64, private: bool) -> Entry {
    let texts: Vec<String> = (first..first + count).map(|id| text(run, id)).collect();
    let to = private.then(|| "bob".into());
    Entry::addressed(EventId(first), to, texts.iter().map(|text| text.as_bytes()))
}

/// A channel as Redis holds it.
struct Channel {
    run: u64,
    base: u64,
    head: u64,
    oldest: u64,
    /// Every event ever given, by id.
    given: BTreeMap<u64, String>,
    private: BTreeMap<u64, bool>,
}

impl Channel {
    fn page(&self, after: u64, limit: u64) -> Page {
        let first = (after + 1).max(self.oldest);
        let last = self.head.min(first + limit - 1);
        let entries = (first..=last).map(|id| entry(self.run, id, 1, self.private[&id])).collect::<Vec<_>>();
        Page {
            after: EventId(after),
            base: EventId(self.base),
            head: EventId(self.head),
            oldest: EventId(self.oldest),
            entries,
        }
    }
}

/// What everyone behind the sequence sees, checked as it comes.
struct Client {
    position: u64,
    seen: Vec<(u64, String)>,
    resets: usize,
}

impl Client {
    fn take(&mut self, out: &mut Vec<Entry>, given: &BTreeMap<u64, String>) {
        for entry in out.drain(..) {
            if entry.ids() == 0 {
                assert!(entry.last.0 >= self.position, "a reset never goes back");
                self.position = entry.last.0;
                self.resets += 1;
                continue;
            }
            assert_eq!(entry.before().0, self.position, "a gap without a reset, or a double");
            for (at, id) in (self.position + 1..=entry.last.0).enumerate() {
                let whole = entry.after(EventId(id - 1)).expect("the entry reaches past this id");
                let end = whole.frame_end(0) as usize;
                let shown = String::from_utf8(whole.bytes[2..end].to_vec()).unwrap();
                assert_eq!(shown, given[&id], "frame {at} of the entry");
                self.seen.push((id, shown));
            }
            self.position = entry.last.0;
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Events are published; their live message comes, comes twice, comes later, or never.
    Publish { count: u64, private: bool, fate: u8 },
    /// A late message comes, whichever.
    Deliver(usize),
    /// A message that nobody published comes.
    Rogue(u64),
    /// The channel is re-anchored this far ahead.
    Anchor(u64),
    /// Only this many of the newest events stay.
    Trim(u64),
    /// A canary comes, perhaps from some steps ago.
    Canary(bool),
    /// A read is asked, if one is wanted.
    Ask,
    /// The read is answered from this moment's history.
    Execute,
    /// The answer comes.
    Answer,
    /// The answer gets lost.
    Fail,
    /// A client claims to be ahead.
    Look,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1u64..4, any::<bool>(), 0u8..8)
            .prop_map(|(count, private, fate)| Step::Publish { count, private, fate }),
        3 => any::<usize>().prop_map(Step::Deliver),
        1 => (1u64..50).prop_map(Step::Rogue),
        1 => (10u64..100).prop_map(Step::Anchor),
        1 => (0u64..6).prop_map(Step::Trim),
        2 => any::<bool>().prop_map(Step::Canary),
        3 => Just(Step::Ask),
        3 => Just(Step::Execute),
        3 => Just(Step::Answer),
        1 => Just(Step::Fail),
        1 => Just(Step::Look),
    ];
    prop::collection::vec(step, 1..120)
}

fn play(steps: Vec<Step>) {
    let mut redis = Channel {
        run: 1,
        base: 1000,
        head: 1000,
        oldest: 1001,
        given: BTreeMap::new(),
        private: BTreeMap::new(),
    };
    let mut sequence = Sequence::new(EventId(1000), EventId(1000));
    let mut client = Client { position: 1000, seen: Vec::new(), resets: 0 };
    let mut late: Vec<Entry> = Vec::new();
    let mut old_canary = (1000, 1000);
    let mut asked: Option<EventId> = None;
    let mut answer: Option<Page> = None;
    let mut disturbed = false;
    let mut out = Vec::new();
    for step in steps {
        match step {
            Step::Publish { count, private, fate } => {
                let first = redis.head + 1;
                for id in first..first + count {
                    redis.given.insert(id, text(redis.run, id));
                    redis.private.insert(id, private);
                }
                redis.head += count;
                let message = entry(redis.run, first, count, private);
                match fate {
                    0 => {}
                    1 => late.push(message),
                    2 => {
                        sequence.live(message.clone(), &mut out);
                        sequence.live(message, &mut out);
                    }
                    _ => sequence.live(message, &mut out),
                }
            }
            Step::Deliver(which) => {
                if !late.is_empty() {
                    let message = late.swap_remove(which % late.len());
                    sequence.live(message, &mut out);
                }
            }
            Step::Rogue(distance) => {
                // The next id itself would be believed: whoever may publish there is trusted.
                let first = redis.head.max(client.position) + 1 + distance;
                sequence.live(entry(0, first, 1, false), &mut out);
                // A node never counts a hint as seen, so an id like this may be given later.
                sequence.ahead.retain(|entry| entry.last.0 != first);
            }
            Step::Anchor(distance) => {
                redis.run += 1;
                redis.base = redis.head.max(client.position) + distance;
                redis.head = redis.base;
                redis.oldest = redis.head + 1;
                disturbed = true;
            }
            Step::Trim(keep) => {
                redis.oldest = redis.oldest.max((redis.head + 1).saturating_sub(keep));
                disturbed = true;
            }
            Step::Canary(stale) => {
                let now = (redis.base, redis.head);
                let (base, head) = if stale { std::mem::replace(&mut old_canary, now) } else { now };
                sequence.canary(EventId(base), EventId(head));
            }
            Step::Ask => {
                if let Some(position) = sequence.ask() {
                    asked = Some(position);
                }
            }
            Step::Execute => {
                if let Some(position) = asked {
                    answer = Some(redis.page(position.0, 5));
                }
            }
            Step::Answer => {
                if let (Some(position), Some(page)) = (asked, answer.take()) {
                    asked = None;
                    sequence.answer(position, &page, &mut out);
                }
            }
            Step::Fail => {
                if asked.take().is_some() {
                    answer = None;
                    sequence.failed();
                }
            }
            Step::Look => sequence.look(),
        }
        client.take(&mut out, &redis.given);
    }
    // Now everything works: one canary, and reads as long as they are wanted.
    if asked.is_some() {
        sequence.failed();
    }
    sequence.canary(EventId(redis.base), EventId(redis.head));
    let mut reads = 0;
    while let Some(position) = sequence.ask() {
        sequence.answer(position, &redis.page(position.0, 5), &mut out);
        client.take(&mut out, &redis.given);
        reads += 1;
        assert!(reads < 2000, "reads without end");
    }
    assert_eq!(client.position, redis.head);
    assert_eq!(sequence.base().0, redis.base);
    if !disturbed {
        assert_eq!(client.resets, 0, "a reset although history held everything");
        assert_eq!(client.seen.len() as u64, redis.head - 1000, "every event, once");
    }
    assert!(client.seen.windows(2).all(|pair| pair[0].0 < pair[1].0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn hands_on_every_event_in_order_or_says_so(steps in steps()) {
        play(steps);
    }
}

#[test]
fn a_hint_that_history_does_not_hold_is_read_for_once_and_forgotten() {
    let redis =
        Channel { run: 1, base: 10, head: 10, oldest: 11, given: BTreeMap::new(), private: BTreeMap::new() };
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.live(entry(1, 500, 1, false), &mut out);
    let asked = sequence.ask().expect("the hint triggers a read");
    sequence.answer(asked, &redis.page(10, 5), &mut out);
    assert_eq!(sequence.ask(), None);
    assert!(out.is_empty() && sequence.ahead.is_empty());
}

#[test]
fn a_late_message_that_fills_the_hole_lets_the_waiting_ones_through() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.live(entry(1, 12, 2, false), &mut out);
    assert!(out.is_empty());
    sequence.live(entry(1, 11, 1, false), &mut out);
    assert_eq!(sequence.position(), EventId(13));
    assert_eq!(out.len(), 2);
}

#[test]
fn what_was_trimmed_is_announced_at_the_oldest_that_history_holds() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.canary(EventId(10), EventId(30));
    let asked = sequence.ask().unwrap();
    let page = Page {
        after: EventId(0),
        base: EventId(10),
        head: EventId(30),
        oldest: EventId(21),
        entries: vec![entry(1, 21, 10, false)],
    };
    sequence.answer(asked, &page, &mut out);
    assert_eq!(out[0].last, EventId(20));
    assert_eq!(out[0].ids(), 0);
    assert_eq!(out[1].last, EventId(30));
    assert_eq!(sequence.ask(), None);
}

#[test]
fn history_that_reaches_back_over_an_anchor_proves_nothing() {
    let mut sequence = Sequence::new(EventId(5), EventId(10));
    let mut out = Vec::new();
    sequence.canary(EventId(20), EventId(30));
    let asked = sequence.ask().unwrap();
    let page = Page {
        after: EventId(0),
        base: EventId(20),
        head: EventId(30),
        oldest: EventId(5),
        entries: vec![entry(1, 11, 20, false)],
    };
    sequence.answer(asked, &page, &mut out);
    assert_eq!((out[0].ids(), out[0].last), (0, EventId(20)));
    assert_eq!((out[1].before(), out[1].last), (EventId(20), EventId(30)));
}

#[test]
fn a_higher_base_alone_is_reason_to_read() {
    let mut sequence = Sequence::new(EventId(100), EventId(105));
    sequence.canary(EventId(100), EventId(105));
    assert_eq!(sequence.ask(), None);
    sequence.canary(EventId(103), EventId(105));
    assert_eq!(sequence.ask(), Some(EventId(105)));
}

#[test]
fn what_someone_deleted_is_announced_and_not_read_for_without_end() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.canary(EventId(10), EventId(14));
    let asked = sequence.ask().unwrap();
    // 11 and 12 are there, 13 is deleted from the middle; later also the newest.
    let page = |entries: Vec<Entry>, head: u64| Page {
        after: EventId(0),
        base: EventId(10),
        head: EventId(head),
        oldest: EventId(11),
        entries,
    };
    let entries = vec![entry(1, 11, 2, false), entry(1, 14, 1, false)];
    sequence.answer(asked, &page(entries, 14), &mut out);
    let shape: Vec<_> = out.drain(..).map(|entry| (entry.ids(), entry.last.0)).collect();
    assert_eq!(shape, [(2, 12), (0, 13), (1, 14)]);
    sequence.canary(EventId(10), EventId(16));
    let asked = sequence.ask().unwrap();
    sequence.answer(asked, &page(Vec::new(), 16), &mut out);
    assert_eq!((out[0].ids(), out[0].last), (0, EventId(16)));
    assert_eq!(sequence.ask(), None);
}

#[test]
fn answer_to_a_question_that_live_events_overtook_is_handed_on_from_there() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.canary(EventId(10), EventId(15));
    let asked = sequence.ask().expect("the canary triggers a read");
    sequence.live(entry(1, 11, 2, false), &mut out);
    let page = |entries: Vec<Entry>, head: u64| Page {
        after: asked,
        base: EventId(10),
        head: EventId(head),
        oldest: EventId(11),
        entries,
    };
    // The position is inside the second entry.
    let entries = vec![entry(1, 11, 1, false), entry(1, 12, 2, false), entry(1, 14, 2, true)];
    sequence.answer(asked, &page(entries, 15), &mut out);
    let shape: Vec<_> = out.drain(..).map(|entry| (entry.ids(), entry.last.0)).collect();
    assert_eq!(shape, [(2, 12), (1, 13), (2, 15)]);
    assert_eq!(sequence.ask(), None, "nothing is read again");
    // One that does not reach the position brings nothing, and no reset.
    sequence.look();
    let asked = sequence.ask().expect("a look is a read");
    sequence.live(entry(1, 16, 3, false), &mut out);
    sequence.answer(asked, &page(vec![entry(1, 16, 1, false)], 16), &mut out);
    assert_eq!((out.len(), sequence.position(), sequence.ask()), (1, EventId(18), None));
}

#[test]
fn an_answer_with_a_lower_base_is_ignored() {
    let mut sequence = Sequence::new(EventId(100), EventId(105));
    let mut out = Vec::new();
    sequence.look();
    let asked = sequence.ask().unwrap();
    let page = Page {
        after: EventId(0),
        base: EventId(50),
        head: EventId(106),
        oldest: EventId(51),
        entries: vec![entry(1, 106, 1, false)],
    };
    sequence.answer(asked, &page, &mut out);
    assert!(out.is_empty());
    assert_eq!(sequence.position(), EventId(105));
}
