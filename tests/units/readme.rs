//! The documents say what the program does: README and CHANGELOG beside `--help` and the code.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;

use fanfare::metrics::{Metrics, Readiness};
use fanfare::protocol::close::{CloseReason, REASONS};
use fanfare::protocol::event::{Entry, EventId};
use fanfare::protocol::frame::{self, ClientFrame, ErrorCode};
use serde_json::Value;

use crate::common::sources::has_test;

const README: &str = include_str!("../../README.md");
const CHANGELOG: &str = include_str!("../../CHANGELOG.md");

fn help() -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_fanfare")).arg("--help").output();
    let output = output.expect("fanfare is built");
    assert!(output.status.success());
    String::from_utf8(output.stdout).expect("--help is UTF-8")
}

/// What stands under a heading, up to the next one of its level or above.
fn section(heading: &str) -> &'static str {
    let level = heading.bytes().take_while(|byte| *byte == b'#').count();
    let start = README.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("{heading} is missing"));
    let rest = &README[start + heading.len() + 2..];
    let is_next = |line: &str| {
        let marks = line.bytes().take_while(|byte| *byte == b'#').count();
        (1..=level).contains(&marks) && line.as_bytes().get(marks) == Some(&b' ')
    };
    let mut end = 0;
    for line in rest.split_inclusive('\n') {
        if is_next(line) {
            break;
        }
        end += line.len();
    }
    &rest[..end]
}

/// The rows of a section's tables below their heads, cell by cell.
fn rows(text: &str) -> Vec<Vec<String>> {
    let lines = text.lines().filter(|line| line.starts_with('|'));
    let cells = lines.map(|line| {
        let line = line.replace(r"\|", "\u{0}");
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().replace('\u{0}', "|")).collect::<Vec<_>>()
    });
    let cells: Vec<_> = cells.collect();
    let is_rule = |row: &[String]| row.iter().all(|cell| cell.starts_with("---"));
    let is_head = |at: usize| cells.get(at + 1).is_some_and(|next| is_rule(next));
    (0..cells.len()).filter(|at| !is_rule(&cells[*at]) && !is_head(*at)).map(|at| cells[at].clone()).collect()
}

/// Code in the text, between two backticks.
fn inline_code(text: &str) -> Vec<&str> {
    let mut fenced = false;
    let prose = text.lines().filter(move |line| {
        let fence = line.starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    });
    prose.flat_map(|line| line.split('`').skip(1).step_by(2)).collect()
}

/// The lines of a section's JSON blocks.
fn json_lines(text: &str) -> Vec<&str> {
    let blocks = text.split("```json\n").skip(1);
    blocks.flat_map(|block| block.lines().take_while(|line| *line != "```")).collect()
}

/// The JSON of a frame of the server's.
fn text_of(frame: &[u8]) -> &str {
    let head = if frame[1] == 126 { 4 } else { 2 };
    std::str::from_utf8(&frame[head..]).expect("frames are UTF-8")
}

#[test]
fn the_settings_table_is_what_help_says() {
    let help = help();
    let mut expected = Vec::new();
    for line in help.lines().filter(|line| line.starts_with("  --") && line.contains("FANFARE_")) {
        let (setting, default) = line.split_once(" default ").unwrap();
        let (flag, variable) = setting.split_at(setting.find("FANFARE_").unwrap());
        expected.push([flag, variable, default].map(|part| format!("`{}`", part.trim())));
    }
    assert!(expected.len() >= 18, "--help was not understood: {help}");
    let shown: Vec<_> = rows(section("## Settings")).into_iter().map(|row| row[..3].to_vec()).collect();
    assert_eq!(shown, expected);
}

#[test]
fn flags_and_metrics_in_the_text_exist() {
    let help = help();
    let metrics = Metrics::new(1, Arc::default(), Arc::new(Readiness::default())).prometheus();
    let (mut flags, mut series) = (0, 0);
    for code in inline_code(README).into_iter().chain(inline_code(CHANGELOG)) {
        let name = code.split(' ').next().unwrap();
        if name.starts_with("--") {
            flags += 1;
            assert!(help.split_whitespace().any(|word| word == name), "{name} is no flag");
        }
        let words = code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for word in words.filter(|word| word.starts_with("fanfare_") || word.starts_with("process_")) {
            let is_metric = [" ", "{"].iter().any(|next| metrics.contains(&format!("\n{word}{next}")));
            let histogram = metrics.contains(&format!("\n# TYPE {word} histogram"));
            assert!(is_metric || histogram || word == "fanfare_publish", "{word} is no metric");
            series += 1;
        }
    }
    assert!(flags > 18 && series > 10, "{flags} flags, {series} metrics: the text was not understood");
}

#[test]
fn every_example_of_the_protocol_is_json() {
    let protocol = section("## Protocol");
    let inline = inline_code(protocol).into_iter().filter(|code| code.starts_with('{'));
    let examples: Vec<_> = json_lines(protocol).into_iter().chain(inline).collect();
    assert!(examples.len() > 12, "only {examples:?} was found");
    for example in examples {
        let value = serde_json::from_str::<Value>(example);
        assert!(value.is_ok_and(|value| value.is_object()), "{example}");
    }
}

#[test]
fn what_clients_may_send_is_taken() {
    let mut pings = 0;
    for example in json_lines(section("### JSON mode")) {
        let value: Value = serde_json::from_str(example).unwrap();
        if matches!(value["type"].as_str(), Some("ack" | "error")) {
            continue;
        }
        match frame::parse_client_frame("alice", example) {
            Ok(ClientFrame::Ping) => pings += 1,
            Ok(ClientFrame::Publish(_)) => {}
            Err(bad) => panic!("{example}: {}", bad.message),
        }
    }
    assert_eq!(pings, 1);
}

#[test]
fn what_the_server_sends_is_shown_as_it_is() {
    let (id, head) = (EventId(1_764_000_000_001_045), EventId(1_764_000_000_001_050));
    let refused = frame::parse_client_frame("alice", r#"{"text":"a","data":1,"ref":7}"#).unwrap_err();
    let frames = [
        frame::welcome(id, head, true),
        frame::welcome(head, head, false),
        Entry::reset(head).bytes,
        frame::json_ping(Some(head)),
        frame::json_ping(None),
        frame::error(ErrorCode::Unavailable, frame::NOT_PUBLISHED, None),
        frame::error(ErrorCode::Invalid, &refused.message, refused.reference.as_deref()),
        frame::ack("7", EventId(1_764_000_000_001_047)),
    ];
    let protocol = section("## Protocol");
    for frame in &frames {
        let text = text_of(frame);
        assert!(protocol.contains(text), "README does not show {text}");
    }
    let event = frame::with_id(&frame::chat_event("alice", "hi"), id);
    assert!(protocol.contains(std::str::from_utf8(&event).unwrap()));
}

#[test]
fn the_close_codes_are_those_of_the_code() {
    const ALL: [CloseReason; REASONS] = [
        CloseReason::ClosedByPeer,
        CloseReason::ConnectionLost,
        CloseReason::Protocol,
        CloseReason::Binary,
        CloseReason::InvalidText,
        CloseReason::MessageTooBig,
        CloseReason::MessageTimeout,
        CloseReason::PingTimeout,
        CloseReason::MissedEvents,
        CloseReason::PublishFailed,
        CloseReason::Draining,
        CloseReason::HttpResponse,
        CloseReason::RequestTimeout,
        CloseReason::OriginNotAllowed,
        CloseReason::Forbidden,
        CloseReason::Unauthorized,
        CloseReason::TokenExpired,
        CloseReason::RateLimited,
        CloseReason::NodeLimit,
        CloseReason::IpLimit,
        CloseReason::UserLimit,
        CloseReason::ProxyNotTrusted,
        CloseReason::SlowReader,
    ];
    let sent: BTreeMap<_, _> = ALL.iter().filter_map(|reason| reason.close()).collect();
    let shown: BTreeMap<u16, String> = rows(section("### Staying, and leaving"))
        .into_iter()
        .map(|row| (row[0].parse().unwrap(), row[1].trim_matches('`').to_owned()))
        .collect();
    let sent: BTreeMap<u16, String> = sent.into_iter().map(|(code, text)| (code, text.to_owned())).collect();
    assert_eq!(shown, sent);
}

#[test]
fn every_promise_names_tests_that_exist() {
    let promises = section("## What fanfare promises, and what not");
    let mut shown = 0;
    for row in rows(promises) {
        let named = inline_code(row.last().expect("a row has cells"));
        assert!(!named.is_empty(), "nothing shows {row:?}");
        shown += named.len();
    }
    let named: Vec<_> = inline_code(promises).into_iter().filter(|code| code.contains("::")).collect();
    assert!(named.len() >= shown && shown > 30, "{shown} of {named:?}");
    for name in named {
        assert!(has_test(name), "there is no {name}");
    }
}

#[test]
fn the_changelog_begins_with_this_version() {
    let newest = CHANGELOG.lines().find_map(|line| line.strip_prefix("## ")).unwrap();
    assert_eq!(newest.split(' ').next(), Some(env!("CARGO_PKG_VERSION")));
}

#[test]
fn links_within_the_readme_lead_somewhere() {
    let anchor = |heading: &str| -> String {
        let kept = heading.to_lowercase();
        kept.chars()
            .filter(|c| c.is_alphanumeric() || " -".contains(*c))
            .collect::<String>()
            .replace(' ', "-")
    };
    let anchors: Vec<_> = README
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| anchor(line.trim_start_matches('#').trim()))
        .collect();
    let links: Vec<_> =
        README.split("](#").skip(1).map(|rest| rest.split(')').next().unwrap().to_owned()).collect();
    assert!(!links.is_empty());
    for link in links {
        assert!(anchors.contains(&link), "#{link} leads nowhere: {anchors:?}");
    }
}
