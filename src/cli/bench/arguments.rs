//! The command line of `fanfare bench`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::mark::MARK;
use super::phase::{self, Phase};
use super::plan::{CONNECTIONS_PER_PROCESS, Greeting, Plan, Publish, Target};
use crate::config::SettingError;
use crate::config::args::{Args, Flag};
use crate::http::percent_decode;

pub const HELP: &str = "\
Usage: fanfare bench URL... [flags]

Loads a WebSocket server that broadcasts, and checks what it delivers: order,
duplicates, gaps, and that every client gets every event. URL is that of the
WebSocket, with {i} for the number of a client. Clients connect to several URLs
in turn, such as those of the nodes of one Redis:

  fanfare bench ws://127.0.0.1:8080/ws/{i}

Load
  --connections N       Clients that receive [1000]
  --phases LIST         What happens, in order, separated by commas:
                        connect, idle TIME, rate N/s TIME, saturate N TIME
                        (N events in flight), storm N% [TIME] (reconnect
                        at once, after a time), stall N% TIME (read nothing),
                        churn N/s TIME, leave
                        [connect, idle 3s, rate 10/s 10s, rate 50/s 5s,
                        storm 50%, churn 50/s 5s, leave]
  --rate N/s            Events while clients storm, stall or churn [10/s]
  --size BYTES          Text of an event, at least 18 [128]
  --connect-rate N/s    New connections [as fast as handshakes complete]
  --channels N          Channels that clients and events are divided among;
                        {channel} is their number, from 0 [1]
  --bind IP,...         Source addresses [127.0.0.x for a loopback address]
  --processes N         Processes for the clients [one per 16,000]

Protocol of the server
  --subprotocol NAME    Sec-WebSocket-Protocol
  --header LINE...      A header of the upgrade and of HTTP requests
  --hello TEXT...       A message after the upgrade, with {i}
  --ready TEXT          The client is ready at a message with this text
  --answer TEXT=TEXT... Messages that start with one text get the other
  --resume NAME         Query parameter with the last event id, as in fanfare
                        [lastEventId if the server has it]

Publishing, with {event} for the text of an event, and {channel}
  --message TEXT        The message that a client sends [{event}]
  --publish URL         Publish by HTTP POST (http://) or Redis (redis://)
  --body TEXT           Body of the POST [{\"text\":\"{event}\"}]
  --command TEXT        Command of Redis, its words separated by spaces
                        [PUBLISH ws_broadcast {event}]

Result
  --pid N,...           Processes of the server [those that listen on its port]
  --json                Print JSON instead of a table
  --svg FILE            Draw latency, deliveries and percentiles

Exit code: 0; 1 if an event was lost, doubled or reordered, or a client was
refused or closed; 2 for wrong arguments; 3 if only the measurement is void,
since this program had too little CPU.
";

const FLAGS: [Flag; 21] = [
    Flag::new("connections", "N"),
    Flag::new("phases", "LIST"),
    Flag::new("rate", "N/s"),
    Flag::new("size", "BYTES"),
    Flag::new("connect-rate", "N/s"),
    Flag::new("channels", "N"),
    Flag::new("bind", "IP,..."),
    Flag::new("processes", "N"),
    Flag::new("subprotocol", "NAME"),
    Flag::new("header", "LINE..."),
    Flag::new("hello", "TEXT..."),
    Flag::new("ready", "TEXT"),
    Flag::new("answer", "TEXT=TEXT..."),
    Flag::new("resume", "NAME"),
    Flag::new("message", "TEXT"),
    Flag::new("publish", "URL"),
    Flag::new("body", "TEXT"),
    Flag::new("command", "TEXT"),
    Flag::new("pid", "N,..."),
    Flag::new("json", ""),
    Flag::new("svg", "FILE"),
];

/// Parsed command line.
#[derive(Debug)]
pub struct Options {
    pub plan: Plan,
    /// Probe the server for a `welcome`, since `--resume` is absent.
    pub detects_resume: bool,
    pub pids: Vec<u32>,
    pub json: bool,
    pub svg: Option<PathBuf>,
}

/// Reads the flags after the URLs. `None`: help is asked for.
pub fn read(
    urls: &[String],
    args: impl Iterator<Item = std::ffi::OsString>,
) -> Result<Option<Options>, Vec<SettingError>> {
    let flags = [&FLAGS[..], &[Flag::new("help", "")]].concat();
    let mut args = Args::read(args, &flags);
    if args.switch("help") {
        return Ok(None);
    }
    let headers = args.take_all("header");
    let mut targets = Vec::new();
    for url in urls {
        match parse_target(url) {
            Ok(target) => targets.push(target),
            Err(problem) => args.error(url, problem),
        }
    }
    let connections = args.value("connections", |text| whole(text, 1, 10_000_000)).unwrap_or(1000);
    let least = connections.div_ceil(CONNECTIONS_PER_PROCESS);
    let processes =
        args.value("processes", |text| whole(text, least, connections.min(1000))).unwrap_or(least);
    let channels = args.value("channels", |text| whole(text, 1, connections)).unwrap_or(1);
    let size = args.value("size", |text| whole(text, MARK as u32, 1 << 20)).unwrap_or(128) as usize;
    let bind = args.value("bind", |text| text.split(',').map(parse_ip).collect());
    let bind = bind.unwrap_or_else(|| sources(&targets, connections));
    let phases = args.value("phases", phase::parse_list).unwrap_or_else(default_phases);
    let saturates = |phase: &Phase| matches!(phase, Phase::Saturate(..));
    if channels > 1 && phases.iter().any(saturates) {
        args.error("--phases", "saturate needs a single channel: one client shows what is in flight");
    }
    let publish = publish(&mut args, &headers);
    if channels > 1 && matches!(publish, Publish::Socket { .. }) {
        args.error("--channels", "needs --publish: a client publishes to its own channel alone");
    }
    let mut answers = Vec::new();
    for text in args.take_all("answer") {
        match text.split_once('=') {
            Some((received, reply)) => answers.push((received.to_owned(), reply.to_owned())),
            None => args.error("--answer", format!("{text:?} has no = between message and answer")),
        }
    }
    let resume = args.take("resume");
    let greeting = Greeting { hello: args.take_all("hello"), ready: args.take("ready"), answers };
    let detects_resume = resume.is_none() && greeting.ready.is_none();
    let connect_rate = args.value("connect-rate", phase::per_second);
    let rate = args.value("rate", phase::per_second).unwrap_or(10.0);
    let subprotocol = args.take("subprotocol");
    let pids = args.value("pid", |text| text.split(',').map(|pid| whole(pid.trim(), 1, u32::MAX)).collect());
    let (json, svg) = (args.switch("json"), args.take("svg").map(PathBuf::from));
    if !args.errors.is_empty() {
        return Err(args.errors);
    }
    let plan = Plan {
        targets,
        subprotocol,
        headers,
        connections,
        channels,
        processes,
        bind,
        connect_rate,
        greeting,
        publish,
        size,
        rate,
        resume,
        phases,
    };
    Ok(Some(Options { plan, detects_resume, pids: pids.unwrap_or_default(), json, svg }))
}

fn default_phases() -> Vec<Phase> {
    let seconds = Duration::from_secs;
    vec![
        Phase::Connect,
        Phase::Idle(seconds(3)),
        Phase::Rate(10.0, seconds(10)),
        Phase::Rate(50.0, seconds(5)),
        Phase::Storm(0.5, Duration::ZERO),
        Phase::Churn(50.0, seconds(5)),
        Phase::Leave,
    ]
}

fn whole(text: &str, least: u32, most: u32) -> Result<u32, String> {
    match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("{text:?} is not a whole number from {least} to {most}")),
    }
}

fn parse_ip(text: &str) -> Result<IpAddr, String> {
    text.trim().parse().map_err(|_| format!("{text:?} is not an IP address"))
}

/// Sources for connections to loopback addresses: each has some 28,000 free ports for one target.
fn sources(targets: &[Target], connections: u32) -> Vec<IpAddr> {
    if !targets.iter().all(|target| target.addr.is_ipv4() && target.addr.ip().is_loopback()) {
        return Vec::new();
    }
    (0..connections.div_ceil(CONNECTIONS_PER_PROCESS))
        .map(|number| IpAddr::V4(Ipv4Addr::from(0x7F00_0001 + number)))
        .collect()
}

fn parse_url(text: &str, schemes: &[&str]) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("is not a URL: {error}"))?;
    if !schemes.contains(&url.scheme()) {
        let secure = matches!(url.scheme(), "wss" | "https" | "rediss");
        let advice = if secure { ": TLS is not supported, load the server behind the proxy" } else { "" };
        return Err(format!("must start with {}://{advice}", schemes.join(":// or ")));
    }
    Ok(url)
}

/// The address and the `Host` header of a URL.
fn resolve(url: &Url, default_port: u16) -> Result<(SocketAddr, String), String> {
    let host = url.host_str().ok_or("has no host")?;
    let port = url.port().unwrap_or(default_port);
    let mut found =
        (host.trim_matches(['[', ']']), port).to_socket_addrs().map_err(|error| error.to_string())?;
    let addr = found.next().ok_or("has no address")?;
    Ok((addr, if port == default_port { host.to_owned() } else { format!("{host}:{port}") }))
}

/// What stands for `{i}` and `{channel}` in a URL, whose braces would be percent-encoded.
const PLACEHOLDERS: [(&str, &str); 2] = [("{i}", "fanfare-client-number"), ("{channel}", "fanfare-channel")];

fn hide_placeholders(text: &str) -> String {
    PLACEHOLDERS.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Path and query, with the placeholders.
fn path_of(url: &Url) -> String {
    let path = url[url::Position::BeforePath..url::Position::AfterQuery].to_owned();
    PLACEHOLDERS.iter().fold(path, |path, (to, from)| path.replace(from, to))
}

fn parse_target(text: &str) -> Result<Target, String> {
    let url = parse_url(&hide_placeholders(text), &["ws"])?;
    let (addr, host) = resolve(&url, 80)?;
    Ok(Target { addr, host, path: path_of(&url) })
}

fn publish(args: &mut Args, headers: &[String]) -> Publish {
    let message = args.take("message").unwrap_or_else(|| "{event}".into());
    let body = args.take("body").unwrap_or_else(|| r#"{"text":"{event}"}"#.into());
    let command = args.take("command").unwrap_or_else(|| "PUBLISH ws_broadcast {event}".into());
    let by_url = args.value("publish", |text| {
        let url = parse_url(&hide_placeholders(text), &["http", "redis"])?;
        if url.scheme() == "redis" {
            let (addr, _) = resolve(&url, 6379)?;
            let command = command.split_whitespace().map(str::to_owned).collect();
            return Ok(Publish::Redis { addr, setup: redis_setup(&url)?, command });
        }
        let (addr, host) = resolve(&url, 80)?;
        Ok(Publish::Http { addr, host, path: path_of(&url), headers: headers.to_vec(), body: body.clone() })
    });
    by_url.unwrap_or(Publish::Socket { message })
}

/// The commands that log in and choose the database as a Redis URL says.
fn redis_setup(url: &Url) -> Result<Vec<Vec<String>>, String> {
    let parts = [url.username(), url.password().unwrap_or_default()].map(percent_decode);
    let [Some(user), Some(password)] = parts else { return Err("is not percent-encoded UTF-8".into()) };
    let login = match (&*user, &*password) {
        ("", "") => vec![],
        ("", password) => vec!["AUTH", password],
        (user, password) => vec!["AUTH", user, password],
    };
    let database = match url.path().trim_matches('/') {
        "" => vec![],
        database => vec!["SELECT", database],
    };
    let commands = [login, database].into_iter().filter(|command| !command.is_empty());
    Ok(commands.map(|words| words.into_iter().map(str::to_owned).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_words(words: &[&str]) -> Result<Option<Options>, Vec<SettingError>> {
        let urls = words.iter().take_while(|word| !word.starts_with('-')).count();
        let (urls, flags) = words.split_at(urls);
        let urls: Vec<String> = urls.iter().map(|url| (*url).to_owned()).collect();
        read(&urls, flags.iter().map(std::ffi::OsString::from))
    }

    #[test]
    fn url_alone_is_enough() {
        let asked = read_words(&["ws://127.0.0.1:8080/ws/{i}?channel=a"]).unwrap().unwrap();
        let plan = asked.plan;
        assert_eq!((plan.connections, plan.processes, plan.phases.len()), (1000, 1, 7));
        let [target] = &plan.targets[..] else { panic!("{plan:?}") };
        assert_eq!((&*target.path, &*target.host), ("/ws/{i}?channel=a", "127.0.0.1:8080"));
        assert!(asked.detects_resume && plan.bind == [IpAddr::from([127, 0, 0, 1])]);
    }

    #[test]
    fn many_connections_take_processes_and_addresses() {
        let plan = read_words(&["ws://127.0.0.1/", "--connections", "200000"]).unwrap().unwrap().plan;
        assert_eq!((plan.processes, plan.bind.len()), (13, 13));
    }

    fn redis_of(url: &str) -> Vec<Vec<String>> {
        match read_words(&["ws://127.0.0.1/", "--publish", url]).unwrap().unwrap().plan.publish {
            Publish::Redis { setup, .. } => setup,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn redis_urls_log_in() {
        assert!(redis_of("redis://127.0.0.1").is_empty());
        assert_eq!(redis_of("redis://:p%40ss@127.0.0.1/3"), [&["AUTH", "p@ss"], &["SELECT", "3"]]);
        assert_eq!(redis_of("redis://me:x@127.0.0.1"), [["AUTH", "me", "x"]]);
    }

    #[test]
    fn channels_are_part_of_urls() {
        let url = "ws://127.0.0.1:1/ws/{i}?channel=a.{channel}";
        let publish = ["--publish", "http://127.0.0.1:9/publish?channel=a.{channel}"];
        let words = [&[url, "--channels", "2"], &publish[..]].concat();
        let plan = read_words(&words).unwrap().unwrap().plan;
        assert!(plan.request(3, 0).starts_with("GET /ws/3?channel=a.1 HTTP"));
        let Publish::Http { path, .. } = plan.publish else { panic!("{:?}", plan.publish) };
        assert_eq!(path, "/publish?channel=a.{channel}");
    }

    #[test]
    fn every_wrong_argument_is_an_error() {
        for (words, problem) in [
            (&["http://127.0.0.1/"][..], "must start with ws://"),
            (&["wss://127.0.0.1/"], "TLS is not supported"),
            (&["ws://127.0.0.1/", "http://127.0.0.1/"], "must start with ws://"),
            (&["ws://127.0.0.1/", "--size", "17"], "from 18"),
            (&["ws://127.0.0.1/", "--connections", "0"], "from 1"),
            (&["ws://127.0.0.1/", "--connections", "20000", "--processes", "1"], "from 2"),
            (&["ws://127.0.0.1/", "--phases", "idle 1s"], "start with connect"),
            (&["ws://127.0.0.1/", "--publish", "amqp://x"], "http:// or redis://"),
            (&["ws://127.0.0.1/", "--bind", "x"], "not an IP"),
            (&["ws://127.0.0.1/", "--channels", "2"], "needs --publish"),
            (&["ws://127.0.0.1/", "--channels", "2", "--phases", "connect, saturate 1 1s"], "single channel"),
            (&["ws://127.0.0.1/", "--answer", "ping"], "no = between"),
        ] {
            let errors = read_words(words).unwrap_err();
            assert!(errors.iter().any(|error| error.to_string().contains(problem)), "{words:?}: {errors:?}");
        }
    }

    /// The words of a shell command, without variables.
    fn split_words(command: &str) -> Vec<String> {
        let (mut words, mut quoted) = (vec![String::new()], false);
        for character in command.chars() {
            match character {
                '\'' => quoted = !quoted,
                ' ' if !quoted => words.push(String::new()),
                character => words.last_mut().unwrap().push(character),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    #[test]
    fn commands_of_docs_are_valid() {
        let page = include_str!("../../../docs/benchmarks.md").replace("\\\n", " ");
        let commands: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("fanfare bench ")).collect();
        assert!(commands.len() >= 10, "only {commands:?} was found");
        for command in commands {
            let words = split_words(command);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let read = read_words(&words);
            assert!(read.is_ok(), "{command}: {read:?}");
        }
    }

    #[test]
    fn help_names_every_flag() {
        for flag in FLAGS {
            assert!(HELP.contains(&format!("  {} {}", flag.with_dashes(), flag.value)), "{flag:?}");
        }
        assert!(HELP.lines().all(|line| line.len() <= 80));
    }
}
