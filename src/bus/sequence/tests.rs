use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// The text of an event holds its epoch, which distinguishes it from an event of another epoch
/// with the same id.
fn text(epoch: u64, id: u64) -> String {
    format!(r#"{{"epoch":{epoch},"id":{id}}}"#)
}

fn entry(epoch: u64, first: u64, count: u64, private: bool) -> Entry {
    let texts: Vec<String> = (first..first + count).map(|id| text(epoch, id)).collect();
    let to = private.then(|| "bob".into());
    Entry::addressed(EventId(first), to, texts.iter().map(|text| text.as_bytes()))
}

/// A channel as Redis holds it.
struct Channel {
    epoch: u64,
    base: u64,
    head: u64,
    oldest: u64,
    /// Every event ever published, by id.
    published: BTreeMap<u64, String>,
    private: BTreeMap<u64, bool>,
}

impl Channel {
    fn page(&self, after: u64, limit: u64) -> Page {
        let first = (after + 1).max(self.oldest);
        let last = self.head.min(first + limit - 1);
        let entries =
            (first..=last).map(|id| entry(self.epoch, id, 1, self.private[&id])).collect::<Vec<_>>();
        Page {
            named: Default::default(),
            after: EventId(after),
            base: EventId(self.base),
            head: EventId(self.head),
            oldest: EventId(self.oldest),
            entries,
        }
    }
}

/// What a client behind the sequence receives, checked as it comes.
struct Client {
    position: u64,
    received: Vec<(u64, String)>,
    resets: usize,
}

impl Client {
    fn receive(&mut self, out: &mut Vec<Entry>, published: &BTreeMap<u64, String>) {
        for entry in out.drain(..) {
            if entry.ids() == 0 {
                assert!(entry.last.0 >= self.position, "a reset never goes back");
                self.position = entry.last.0;
                self.resets += 1;
                continue;
            }
            assert_eq!(entry.before().0, self.position, "a gap without a reset, or a duplicate");
            for (at, id) in (self.position + 1..=entry.last.0).enumerate() {
                let whole = entry.after(EventId(id - 1)).expect("the entry reaches past this id");
                let end = whole.frame_end(0) as usize;
                let shown = String::from_utf8(whole.bytes[2..end].to_vec()).unwrap();
                assert_eq!(shown, published[&id], "frame {at} of the entry");
                self.received.push((id, shown));
            }
            self.position = entry.last.0;
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Events are published. `fate`: their live message comes, comes twice, comes later, or never.
    Publish { count: u64, private: bool, fate: u8 },
    /// One of the late messages comes.
    Deliver(usize),
    /// A message with an id comes that no bus has published.
    Rogue(u64),
    /// A new epoch starts this far ahead.
    NewEpoch(u64),
    /// Only this many of the newest events stay.
    Trim(u64),
    /// A probe comes; true for one from some steps ago.
    Probe(bool),
    /// A read starts, if one is due.
    StartRead,
    /// Redis executes the read.
    ExecuteRead,
    /// The page comes.
    Page,
    /// The page is lost.
    FailRead,
    /// A client claims to be ahead.
    Refresh,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1u64..4, any::<bool>(), 0u8..8)
            .prop_map(|(count, private, fate)| Step::Publish { count, private, fate }),
        3 => any::<usize>().prop_map(Step::Deliver),
        1 => (1u64..50).prop_map(Step::Rogue),
        1 => (10u64..100).prop_map(Step::NewEpoch),
        1 => (0u64..6).prop_map(Step::Trim),
        2 => any::<bool>().prop_map(Step::Probe),
        3 => Just(Step::StartRead),
        3 => Just(Step::ExecuteRead),
        3 => Just(Step::Page),
        1 => Just(Step::FailRead),
        1 => Just(Step::Refresh),
    ];
    prop::collection::vec(step, 1..120)
}

fn play(steps: Vec<Step>) {
    let mut redis = Channel {
        epoch: 1,
        base: 1000,
        head: 1000,
        oldest: 1001,
        published: BTreeMap::new(),
        private: BTreeMap::new(),
    };
    let mut sequence = Sequence::new(EventId(1000), EventId(1000));
    let mut client = Client { position: 1000, received: Vec::new(), resets: 0 };
    let mut late: Vec<Entry> = Vec::new();
    let mut old_probe = (1000, 1000);
    let mut asked: Option<EventId> = None;
    let mut page: Option<Page> = None;
    let mut disturbed = false;
    let mut out = Vec::new();
    for step in steps {
        match step {
            Step::Publish { count, private, fate } => {
                let first = redis.head + 1;
                for id in first..first + count {
                    redis.published.insert(id, text(redis.epoch, id));
                    redis.private.insert(id, private);
                }
                redis.head += count;
                let message = entry(redis.epoch, first, count, private);
                match fate {
                    0 => {}
                    1 => late.push(message),
                    2 => {
                        sequence.on_live(message.clone(), &mut out);
                        sequence.on_live(message, &mut out);
                    }
                    _ => sequence.on_live(message, &mut out),
                }
            }
            Step::Deliver(which) => {
                if !late.is_empty() {
                    let message = late.swap_remove(which % late.len());
                    sequence.on_live(message, &mut out);
                }
            }
            Step::Rogue(distance) => {
                // The next id itself would be passed on: programs that may publish there are
                // trusted.
                let first = redis.head.max(client.position) + 1 + distance;
                sequence.on_live(entry(0, first, 1, false), &mut out);
                // A node never counts a hint as seen, so an event may get this id later.
                sequence.ahead.retain(|entry| entry.last.0 != first);
            }
            Step::NewEpoch(distance) => {
                redis.epoch += 1;
                redis.base = redis.head.max(client.position) + distance;
                redis.head = redis.base;
                redis.oldest = redis.head + 1;
                disturbed = true;
            }
            Step::Trim(keep) => {
                redis.oldest = redis.oldest.max((redis.head + 1).saturating_sub(keep));
                disturbed = true;
            }
            Step::Probe(stale) => {
                let now = (redis.base, redis.head);
                let (base, head) = if stale { std::mem::replace(&mut old_probe, now) } else { now };
                sequence.on_probe(EventId(base), EventId(head));
            }
            Step::StartRead => {
                if let Some(position) = sequence.start_read() {
                    asked = Some(position);
                }
            }
            Step::ExecuteRead => {
                if let Some(position) = asked {
                    page = Some(redis.page(position.0, 5));
                }
            }
            Step::Page => {
                if let (Some(position), Some(page)) = (asked, page.take()) {
                    asked = None;
                    sequence.on_page(position, &page, &mut out);
                }
            }
            Step::FailRead => {
                if asked.take().is_some() {
                    page = None;
                    sequence.on_read_failed();
                }
            }
            Step::Refresh => sequence.refresh(),
        }
        client.receive(&mut out, &redis.published);
    }
    // Without faults: one probe, and reads as long as they are due.
    if asked.is_some() {
        sequence.on_read_failed();
    }
    sequence.on_probe(EventId(redis.base), EventId(redis.head));
    let mut reads = 0;
    while let Some(position) = sequence.start_read() {
        sequence.on_page(position, &redis.page(position.0, 5), &mut out);
        client.receive(&mut out, &redis.published);
        reads += 1;
        assert!(reads < 2000, "endless reads");
    }
    assert_eq!(client.position, redis.head);
    assert_eq!(sequence.base().0, redis.base);
    if !disturbed {
        assert_eq!(client.resets, 0, "a reset although history held everything");
        assert_eq!(client.received.len() as u64, redis.head - 1000, "every event, once");
    }
    assert!(client.received.windows(2).all(|pair| pair[0].0 < pair[1].0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn passes_on_every_event_in_order_or_resets(steps in steps()) {
        play(steps);
    }
}

#[test]
fn unknown_hint_is_read_for_once_and_dropped() {
    let redis = Channel {
        epoch: 1,
        base: 10,
        head: 10,
        oldest: 11,
        published: BTreeMap::new(),
        private: BTreeMap::new(),
    };
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.on_live(entry(1, 500, 1, false), &mut out);
    let asked = sequence.start_read().expect("the hint triggers a read");
    sequence.on_page(asked, &redis.page(10, 5), &mut out);
    assert_eq!(sequence.start_read(), None);
    assert!(out.is_empty() && sequence.ahead.is_empty());
}

#[test]
fn late_message_fills_the_gap() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.on_live(entry(1, 12, 2, false), &mut out);
    assert!(out.is_empty());
    sequence.on_live(entry(1, 11, 1, false), &mut out);
    assert_eq!(sequence.position(), EventId(13));
    assert_eq!(out.len(), 2);
}

#[test]
fn trimmed_events_reset_to_the_oldest() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.on_probe(EventId(10), EventId(30));
    let asked = sequence.start_read().unwrap();
    let page = Page {
        named: Default::default(),
        after: EventId(0),
        base: EventId(10),
        head: EventId(30),
        oldest: EventId(21),
        entries: vec![entry(1, 21, 10, false)],
    };
    sequence.on_page(asked, &page, &mut out);
    assert_eq!(out[0].last, EventId(20));
    assert_eq!(out[0].ids(), 0);
    assert_eq!(out[1].last, EventId(30));
    assert_eq!(sequence.start_read(), None);
}

#[test]
fn history_before_the_base_is_not_continuous() {
    let mut sequence = Sequence::new(EventId(5), EventId(10));
    let mut out = Vec::new();
    sequence.on_probe(EventId(20), EventId(30));
    let asked = sequence.start_read().unwrap();
    let page = Page {
        named: Default::default(),
        after: EventId(0),
        base: EventId(20),
        head: EventId(30),
        oldest: EventId(5),
        entries: vec![entry(1, 11, 20, false)],
    };
    sequence.on_page(asked, &page, &mut out);
    assert_eq!((out[0].ids(), out[0].last), (0, EventId(20)));
    assert_eq!((out[1].before(), out[1].last), (EventId(20), EventId(30)));
}

#[test]
fn higher_base_triggers_a_read() {
    let mut sequence = Sequence::new(EventId(100), EventId(105));
    sequence.on_probe(EventId(100), EventId(105));
    assert_eq!(sequence.start_read(), None);
    sequence.on_probe(EventId(103), EventId(105));
    assert_eq!(sequence.start_read(), Some(EventId(105)));
}

#[test]
fn deleted_events_reset_once() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.on_probe(EventId(10), EventId(14));
    let asked = sequence.start_read().unwrap();
    // 11 and 12 are there, 13 is deleted from the middle; later also the newest.
    let page = |entries: Vec<Entry>, head: u64| Page {
        named: Default::default(),
        after: EventId(0),
        base: EventId(10),
        head: EventId(head),
        oldest: EventId(11),
        entries,
    };
    let entries = vec![entry(1, 11, 2, false), entry(1, 14, 1, false)];
    sequence.on_page(asked, &page(entries, 14), &mut out);
    let shape: Vec<_> = out.drain(..).map(|entry| (entry.ids(), entry.last.0)).collect();
    assert_eq!(shape, [(2, 12), (0, 13), (1, 14)]);
    sequence.on_probe(EventId(10), EventId(16));
    let asked = sequence.start_read().unwrap();
    sequence.on_page(asked, &page(Vec::new(), 16), &mut out);
    assert_eq!((out[0].ids(), out[0].last), (0, EventId(16)));
    assert_eq!(sequence.start_read(), None);
}

#[test]
fn page_is_used_from_the_position_on() {
    let mut sequence = Sequence::new(EventId(10), EventId(10));
    let mut out = Vec::new();
    sequence.on_probe(EventId(10), EventId(15));
    let asked = sequence.start_read().expect("the probe triggers a read");
    sequence.on_live(entry(1, 11, 2, false), &mut out);
    let page = |entries: Vec<Entry>, head: u64| Page {
        named: Default::default(),
        after: asked,
        base: EventId(10),
        head: EventId(head),
        oldest: EventId(11),
        entries,
    };
    // The position is inside the second entry.
    let entries = vec![entry(1, 11, 1, false), entry(1, 12, 2, false), entry(1, 14, 2, true)];
    sequence.on_page(asked, &page(entries, 15), &mut out);
    let shape: Vec<_> = out.drain(..).map(|entry| (entry.ids(), entry.last.0)).collect();
    assert_eq!(shape, [(2, 12), (1, 13), (2, 15)]);
    assert_eq!(sequence.start_read(), None, "nothing is read again");
    // A page that ends before the position changes nothing, and causes no reset.
    sequence.refresh();
    let asked = sequence.start_read().expect("a refresh is a read");
    sequence.on_live(entry(1, 16, 3, false), &mut out);
    sequence.on_page(asked, &page(vec![entry(1, 16, 1, false)], 16), &mut out);
    assert_eq!((out.len(), sequence.position(), sequence.start_read()), (1, EventId(18), None));
}

#[test]
fn page_with_a_lower_base_is_ignored() {
    let mut sequence = Sequence::new(EventId(100), EventId(105));
    let mut out = Vec::new();
    sequence.refresh();
    let asked = sequence.start_read().unwrap();
    let page = Page {
        named: Default::default(),
        after: EventId(0),
        base: EventId(50),
        head: EventId(106),
        oldest: EventId(51),
        entries: vec![entry(1, 106, 1, false)],
    };
    sequence.on_page(asked, &page, &mut out);
    assert!(out.is_empty());
    assert_eq!(sequence.position(), EventId(105));
}
