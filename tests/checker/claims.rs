//! What the server claimed to a client, and what the client saw of it: one claim from each
//! announced loss to the next.

use std::collections::BTreeSet;

use super::history::{Moment, Seen, Subscriber};
use super::rules::{Rule, Violation};

/// A range of the sequence for which a client was notified of no loss.
#[derive(Debug)]
pub struct Claim {
    /// The position where it starts. `None`: the client got no position and has seen no event yet.
    pub after: Option<u64>,
    /// Whether `after` was sent by the server; otherwise it is the position before the first event
    /// seen.
    pub from_server: bool,
    /// The last position in it.
    pub position: Option<u64>,
    /// Whether the client stayed to the end, so that the claim covers all later events.
    pub open: bool,
    /// When it started.
    pub since: Moment,
    /// The ids seen in it.
    pub seen: BTreeSet<u64>,
}

impl Claim {
    fn new(after: Option<u64>, since: Moment) -> Claim {
        Claim {
            after,
            from_server: after.is_some(),
            position: after,
            open: false,
            since,
            seen: BTreeSet::new(),
        }
    }
}

/// Reads a client's records, and reports violations in them alone: order, duplicates, positions.
pub fn claims(subscriber: &Subscriber, ids_may_fall: bool, violations: &mut Vec<Violation>) -> Vec<Claim> {
    let mut done: Vec<Claim> = Vec::new();
    let mut claim: Option<Claim> = None;
    let mut connected = false;
    let mut object = |rule, text: String| {
        violations.push(Violation { rule, text: format!("{}: {text}", subscriber.name) })
    };
    for (moment, seen) in &subscriber.seen {
        let position = claim.as_ref().and_then(|claim| claim.position);
        match seen {
            Seen::LetIn | Seen::Welcomed { .. } if connected => {
                object(Rule::Form, format!("{seen:?} on an open connection"));
            }
            Seen::LetIn => {
                if subscriber.recovers {
                    object(Rule::Form, "no welcome came".into());
                }
                connected = true;
                done.extend(claim.replace(Claim::new(None, *moment)));
            }
            Seen::Welcomed { asked, at, head, recovered } => {
                if !subscriber.recovers {
                    object(Rule::Form, format!("it asked for no welcome: {seen:?}"));
                }
                connected = true;
                if asked.is_some() && *asked != position {
                    object(Rule::Position, format!("{seen:?} at position {position:?}"));
                }
                if at > head || (!recovered && at != head) {
                    object(Rule::Position, format!("{seen:?} makes no sense"));
                }
                match (asked, recovered) {
                    (Some(asked), true) if asked == at => {}
                    (Some(_), true) => object(Rule::Position, format!("{seen:?}: not what it asked for")),
                    (Some(_), false) => {
                        if position.is_some_and(|position| *at < position) && !ids_may_fall {
                            object(Rule::Order, format!("{seen:?} leads back from {position:?}"));
                        }
                        done.extend(claim.replace(Claim::new(Some(*at), *moment)));
                    }
                    (None, _) => {
                        if !recovered || at != head {
                            object(
                                Rule::Position,
                                format!("{seen:?}: a newcomer can't have missed anything"),
                            );
                        }
                        done.extend(claim.replace(Claim::new(Some(*at), *moment)));
                    }
                }
            }
            Seen::Event(id, body, _) => {
                let Some(claim) = claim.as_mut().filter(|_| connected) else {
                    object(Rule::Form, format!("{body} with id {id} outside of a connection"));
                    continue;
                };
                if claim.seen.contains(id) {
                    object(Rule::Twice, format!("{body} with id {id} came twice"));
                    continue;
                }
                if position.is_some_and(|position| *id <= position) {
                    object(Rule::Order, format!("{body} with id {id} came at position {position:?}"));
                    continue;
                }
                claim.after.get_or_insert(id.saturating_sub(1));
                claim.position = Some(*id);
                claim.seen.insert(*id);
            }
            Seen::Reset(to) => {
                if !subscriber.recovers || !connected {
                    object(Rule::Form, format!("a reset to {to} without recovery or connection"));
                }
                if position.is_some_and(|position| *to < position) {
                    object(Rule::Order, format!("a reset leads back from {position:?} to {to}"));
                }
                done.extend(claim.replace(Claim::new(Some(*to), *moment)));
            }
            Seen::Stands(at) => {
                let Some(claim) = claim.as_mut().filter(|_| subscriber.recovers && connected) else {
                    object(Rule::Form, format!("its position {at} without recovery or connection"));
                    continue;
                };
                if position.is_some_and(|position| *at < position) {
                    object(
                        Rule::Position,
                        format!("it is said to stand at {at}, and stands at {position:?}"),
                    );
                }
                claim.position = claim.position.max(Some(*at));
            }
            Seen::Ended(code) => {
                if *code == Some(4008) && subscriber.recovers {
                    object(Rule::Form, "closed with 4008 instead of getting a reset".into());
                }
                if !connected {
                    object(Rule::Form, "it ended twice".into());
                }
                connected = false;
                if !subscriber.recovers {
                    done.extend(claim.take());
                }
            }
        }
    }
    if subscriber.stayed {
        match &mut claim {
            Some(claim) if connected => claim.open = true,
            _ => object(Rule::Form, "it is said to have stayed, and was not connected at the end".into()),
        }
    }
    done.extend(claim);
    done
}
