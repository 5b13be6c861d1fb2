//! README, docs/ and CHANGELOG against `--help` and the code.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fanfare::bus::PublishError;
use fanfare::metrics::{Metrics, Readiness};
use fanfare::protocol::client_frame::{self, ClientFrame};
use fanfare::protocol::close::{CloseReason, REASONS, rejection_code};
use fanfare::protocol::event::{ChannelName, Entry, EventId};
use fanfare::protocol::form;
use fanfare::protocol::frame::{self, ErrorCode, Regarding};
use fanfare::protocol::inbox::{MessageId, PublishedId};
use serde_json::Value;

use crate::common::sources::has_test;

const README: &str = include_str!("../../README.md");
const PROTOCOL: &str = include_str!("../../docs/protocol.md");
const BENCHMARKS: &str = include_str!("../../docs/benchmarks.md");
const GUARANTEES: &str = include_str!("../../docs/guarantees.md");
const CHANGELOG: &str = include_str!("../../CHANGELOG.md");
const ALERTS: &str = include_str!("../../grafana/alerts.yml");

/// What `fanfare … --help` prints.
fn help(subcommand: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_fanfare")).args(subcommand).arg("--help").output();
    let output = output.expect("fanfare is built");
    assert!(output.status.success());
    String::from_utf8(output.stdout).expect("--help is UTF-8")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README, CHANGELOG, the other pages beside them, and those of docs/, each with its path.
fn pages() -> Vec<(PathBuf, String)> {
    let mut pages = Vec::new();
    for directory in [root().to_owned(), root().join("docs")] {
        for entry in std::fs::read_dir(directory).expect("directories can be listed") {
            let path = entry.expect("directories can be listed").path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = std::fs::read_to_string(&path).expect("pages are UTF-8");
                pages.push((path, text));
            }
        }
    }
    assert!(pages.len() > 14, "only {} pages", pages.len());
    pages
}

/// The text under a heading, up to the next one of its level or above.
fn section(page: &'static str, heading: &str) -> &'static str {
    let level = heading.bytes().take_while(|byte| *byte == b'#').count();
    let start = page.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("{heading} is missing"));
    let rest = &page[start + heading.len() + 2..];
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

/// The cells of all table rows, without header rows.
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

/// Lines outside of code blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// Code in the text, between two backticks.
fn inline_code(text: &str) -> Vec<&str> {
    prose(text).flat_map(|line| line.split('`').skip(1).step_by(2)).collect()
}

/// The lines of a section's JSON blocks.
fn json_lines(text: &str) -> Vec<&str> {
    let blocks = text.split("```json\n").skip(1);
    blocks.flat_map(|block| block.lines().take_while(|line| *line != "```")).collect()
}

/// The JSON text of a server frame.
fn text_of(frame: &[u8]) -> &str {
    let head = if frame[1] == 126 { 4 } else { 2 };
    std::str::from_utf8(&frame[head..]).expect("frames are UTF-8")
}

#[test]
fn bench_table_matches_help() {
    let help = help(&["bench"]);
    let lines = help.lines().filter_map(|line| line.strip_prefix("  --"));
    let expected: Vec<_> = lines
        .map(|line| {
            let usage = line.split("  ").next().unwrap().trim_end();
            // Only one space separates a long flag and its text.
            format!("`--{}`", usage.split(' ').take(2).collect::<Vec<_>>().join(" "))
        })
        .collect();
    assert!(expected.len() >= 18, "--help was not understood: {help}");
    let shown: Vec<_> =
        rows(section(BENCHMARKS, "### Arguments")).into_iter().map(|row| row[0].clone()).collect();
    assert_eq!(shown, expected);
}

#[test]
fn named_flags_and_metrics_exist() {
    let help = help(&[]) + &help(&["bench"]);
    let metrics = Metrics::new(1, Arc::default(), Arc::new(Readiness::default())).prometheus();
    let (mut flags, mut series) = (0, 0);
    let pages = pages();
    for code in pages.iter().flat_map(|(_, text)| inline_code(text)) {
        let name = code.split(' ').next().unwrap();
        if name.starts_with("--") {
            flags += 1;
            assert!(help.split_whitespace().any(|word| word == name), "{name} is no flag");
        }
        let words = code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for word in words.filter(|word| word.starts_with("fanfare_") || word.starts_with("process_")) {
            let is_metric = [" ", "{"].iter().any(|next| metrics.contains(&format!("\n{word}{next}")));
            let histogram = metrics.contains(&format!("\n# TYPE {word} histogram"));
            let function = ["fanfare_publish", "fanfare_disconnect", "fanfare_unban"].contains(&word);
            assert!(is_metric || histogram || function, "{word} is no metric");
            series += 1;
        }
    }
    assert!(flags > 18 && series > 10, "{flags} flags, {series} metrics: the text was not understood");
}

#[test]
fn alerts_are_explained_and_name_what_exists() {
    let help = help(&[]);
    let metrics = Metrics::new(1, Arc::default(), Arc::new(Readiness::default())).prometheus();
    let alerts: Vec<_> = ALERTS.split("- alert: ").skip(1).collect();
    assert!(alerts.len() > 20, "only {} alerts", alerts.len());
    for alert in alerts {
        for part in ["expr: ", "for: ", "severity: ", "summary: ", "description: "] {
            assert!(alert.contains(part), "no {part:?} in {alert}");
        }
        let words = alert.split(|c: char| !c.is_ascii_alphanumeric() && !"_-".contains(c));
        for word in words.filter(|word| !word.is_empty()) {
            if word.starts_with("--") {
                let is_known = word == "--connections" || help.contains(&format!("  {word} "));
                assert!(is_known, "{word} is no flag, in {alert}");
            }
            if word.starts_with("process_") || word.starts_with("fanfare_") && word != "fanfare_publish" {
                let is_there =
                    |kind: &str, name: &str| metrics.contains(&format!("\n# TYPE {name} {kind}\n"));
                let is_part = ["_bucket", "_count"]
                    .iter()
                    .any(|suffix| word.strip_suffix(suffix).is_some_and(|name| is_there("histogram", name)));
                let is_single = is_there("counter", word) || is_there("gauge", word);
                assert!(is_part || is_single, "{word} is no metric, in {alert}");
            }
        }
    }
}

#[test]
fn protocol_examples_are_json_objects() {
    let inline = inline_code(PROTOCOL).into_iter().filter(|code| code.starts_with('{'));
    let examples: Vec<_> = json_lines(PROTOCOL).into_iter().chain(inline).collect();
    assert!(examples.len() > 12, "only {examples:?} was found");
    for example in examples {
        let value = serde_json::from_str::<Value>(example);
        assert!(value.is_ok_and(|value| value.is_object()), "{example}");
    }
}

#[test]
fn client_frame_examples_are_accepted() {
    let mut pings = 0;
    let sections =
        ["## JSON mode", "## Many channels", "## Inboxes"].map(|heading| section(PROTOCOL, heading));
    for example in sections.into_iter().flat_map(json_lines) {
        let value: Value = serde_json::from_str(example).unwrap();
        if matches!(value["type"].as_str(), Some("ack" | "error")) {
            continue;
        }
        match client_frame::parse("alice", example, 100) {
            Ok(ClientFrame::Ping) => pings += 1,
            Ok(_) => {}
            Err(bad) => panic!("{example}: {}", bad.message),
        }
    }
    assert_eq!(pings, 1);
}

#[test]
fn server_frame_examples_are_exact() {
    let (id, head) = (EventId(1_764_000_000_001_045), EventId(1_764_000_000_001_050));
    let published = EventId(1_764_000_000_001_047);
    let room = ChannelName::parse("room.1").unwrap();
    let event = frame::with_id(&frame::chat_event("alice", "hi"), published);
    let rejected = client_frame::parse("alice", r#"{"text":"a","data":1,"ref":7}"#, 100).unwrap_err();
    let frames = [
        frame::welcome(id, head, true),
        frame::welcome(head, head, false),
        Entry::reset(head).bytes,
        frame::json_ping(Some(head), [].into_iter()),
        frame::json_ping(None, [].into_iter()),
        frame::error(ErrorCode::Unavailable, frame::NOT_PUBLISHED, &Regarding::default()),
        frame::error(
            ErrorCode::Invalid,
            &rejected.message,
            &Regarding { channel: None, reference: rejected.reference },
        ),
        frame::ack("7", published.into()),
        frame::ack("7", PublishedId::Message(MessageId { time: 1_764_000_000_001, sequence: 0 })),
        frame::error(
            ErrorCode::Full,
            &PublishError::Full.to_string(),
            &Regarding { channel: ChannelName::parse("support"), reference: Some("7".into()) },
        ),
        frame::welcome_without_channel(),
        frame::subscription_welcome(&room, id, head, true, Some("1")),
        form::named(&Entry::events(published, [&*event].into_iter()), &room).bytes,
        form::reset(&room, head).bytes,
        frame::unsubscribed(&room, "requested", Some("2")),
        frame::error(
            ErrorCode::Subscribed,
            "you follow this channel already",
            &Regarding { channel: Some(room.clone()), reference: Some("1".into()) },
        ),
        frame::json_ping(Some(head), [(&room, published)].into_iter()),
        frame::token_ack("3"),
        frame::token_expiring(60),
    ];
    for frame in &frames {
        let text = text_of(frame);
        assert!(PROTOCOL.contains(text), "docs/protocol.md does not show {text}");
    }
    let event = frame::with_id(&frame::chat_event("alice", "hi"), id);
    assert!(PROTOCOL.contains(std::str::from_utf8(&event).unwrap()));
}

#[test]
fn close_codes_match_the_code() {
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
        CloseReason::ChannelForbidden,
        CloseReason::Disconnected,
        CloseReason::Banned,
        CloseReason::NodeLimit,
        CloseReason::IpLimit,
        CloseReason::UserLimit,
        CloseReason::ProxyNotTrusted,
        CloseReason::SlowReader,
    ];
    let sent: BTreeSet<_> = ALL.iter().filter_map(|reason| reason.close()).collect();
    let shown: BTreeSet<(u16, String)> = rows(section(PROTOCOL, "## Close codes"))
        .into_iter()
        .map(|row| (row[0].parse().unwrap(), row[1].trim_matches('`').to_owned()))
        .collect();
    let mut sent: BTreeSet<(u16, String)> =
        sent.into_iter().map(|(code, text)| (code, text.to_owned())).collect();
    let rejection = |status| {
        let code = rejection_code(status, CloseReason::HttpResponse)?;
        Some((code, format!("the text of status {status}")))
    };
    sent.extend((400..600).filter_map(rejection));
    // 4403 is sent with another text, too, which its row has among the causes.
    if let Some((code, text)) = CloseReason::ChannelForbidden.close() {
        sent.remove(&(code, text.to_owned()));
    }
    assert_eq!(shown, sent);
}

#[test]
fn guarantees_name_existing_tests() {
    let mut shown = 0;
    for row in rows(GUARANTEES) {
        let named = inline_code(row.last().expect("a row has cells"));
        assert!(!named.is_empty(), "no test in {row:?}");
        shown += named.len();
    }
    let named: Vec<_> = inline_code(GUARANTEES).into_iter().filter(|code| code.contains("::")).collect();
    assert!(named.len() >= shown && shown > 30, "{shown} of {named:?}");
    for name in named {
        assert!(has_test(name), "no test {name}");
    }
}

#[test]
fn changelog_starts_with_this_version() {
    let newest = CHANGELOG.lines().find_map(|line| line.strip_prefix("## ")).unwrap();
    assert_eq!(newest.split(' ').next(), Some(env!("CARGO_PKG_VERSION")));
}

#[test]
fn readme_stays_short() {
    assert!(README.len() <= 10_000, "README has {} bytes: move details to docs/", README.len());
}

#[test]
fn rust_version_matches_cargo_toml() {
    let version = format!("Rust {} or newer", env!("CARGO_PKG_RUST_VERSION"));
    for page in [README, include_str!("../../docs/development.md")] {
        assert!(page.contains(&version), "no {version:?} in {page}");
    }
}

#[test]
fn readme_links_every_page_of_docs() {
    for (path, text) in pages() {
        let Ok(page) = path.strip_prefix(root().join("docs")) else { continue };
        let page = page.display();
        assert!(README.contains(&format!("](docs/{page})")), "README does not link docs/{page}");
        let opening = text.split("\n\n").nth(1).unwrap_or_default();
        assert!(opening.starts_with("This page is for "), "docs/{page} does not say who needs it");
    }
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>().replace(' ', "-")
}

#[test]
fn links_and_anchors_resolve() {
    let mut links = 0;
    for (path, text) in pages() {
        for link in prose(&text).flat_map(|line| line.split("](").skip(1)) {
            let link = link.split(')').next().expect("there is a first part");
            if link.starts_with("http") {
                continue;
            }
            links += 1;
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            assert!(target.exists(), "{}: {link} does not exist", path.display());
            if fragment.is_empty() {
                continue;
            }
            let target = std::fs::read_to_string(&target).expect("pages are UTF-8");
            let mut headings = prose(&target).filter(|line| line.starts_with('#'));
            let is_there = headings.any(|line| anchor(line.trim_start_matches('#').trim()) == fragment);
            assert!(is_there, "{}: {link} has no such heading", path.display());
        }
    }
    assert!(links > 40, "{links} links: the pages were not understood");
}

#[test]
fn named_files_exist() {
    const FOLDERS: [&str; 8] =
        ["src/", "tests/", "benches/", "fuzz/", "systemd/", "grafana/", "docs/", "examples/"];
    let mut files = 0;
    for (path, text) in pages() {
        for word in inline_code(&text).into_iter().flat_map(str::split_whitespace) {
            if !FOLDERS.iter().any(|folder| word.starts_with(folder)) {
                continue;
            }
            files += 1;
            assert!(root().join(word).exists(), "{}: there is no {word}", path.display());
        }
    }
    assert!(files > 10, "{files} files: the pages were not understood");
}
