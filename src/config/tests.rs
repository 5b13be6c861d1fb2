use std::net::SocketAddr;
use std::num::NonZeroU32;

use ipnet::IpNet;
use proptest::prelude::*;
use tracing_subscriber::filter::LevelFilter;

use super::rows::{ROWS, variable};
use super::*;

fn read(args: &[&str], env: &[(&str, &str)]) -> Result<Action, Vec<SettingError>> {
    let args = args.iter().map(OsString::from);
    Settings::from(args, env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))))
}

fn run(args: &[&str], env: &[(&str, &str)]) -> Settings {
    match read(args, env) {
        Ok(Action::Run(settings)) => settings,
        other => panic!("{args:?} {env:?}: {other:?}"),
    }
}

fn errors(args: &[&str], env: &[(&str, &str)]) -> Vec<String> {
    let errors = read(args, env).expect_err("a wrong setting");
    errors.iter().map(SettingError::to_string).collect()
}

/// Each setting's name and effective value.
fn shown(settings: &Settings) -> Vec<(&'static str, String)> {
    ROWS.iter().map(|row| (row.flag.name, (row.show)(settings))).collect()
}

#[test]
fn nothing_given_means_the_defaults() {
    let settings = run(&[], &[]);
    for row in ROWS {
        let name = row.flag.name;
        if !matches!(name, "shards" | "max-connections" | "buffer-memory" | "max-byte-rate") {
            assert_eq!((row.show)(&settings), row.default, "--{name}");
        }
    }
    assert_eq!(settings.shards, std::thread::available_parallelism().unwrap());
    let files = settings.open_files.unwrap_or(u32::MAX);
    assert!((1..=files).contains(&settings.connection_limit()));
    assert_eq!(settings.byte_rate(), 1 << 20);
    assert_eq!(run(&["--max-message-size", "2MiB"], &[]).byte_rate(), 2 << 20);
    assert_eq!(settings.log_targets().default_level(), Some(LevelFilter::INFO));
}

#[test]
fn reads_every_setting_from_flag_and_variable() {
    let others = [
        ("listen", "0.0.0.0:80,[::1]:81"),
        ("admin", "unix:/run/fanfare.sock"),
        ("allow-anonymous", "true"),
        ("jwt-key", "/etc/fanfare/new.pem,/etc/fanfare/old"),
        ("admin-key", "/etc/fanfare/admin.key"),
        ("client-publish", "channel"),
        ("allow-origin", "https://example.com,https://*.example.org:8443,capacitor://localhost,null"),
        ("trusted-proxy", "10.0.0.7/32,fd00::/8"),
        ("redis", "redis://10.0.0.1:6379/2"),
        ("redis-prefix", "app:live"),
        ("redis-durable", "true"),
        ("pubsub-channels", "news,chat"),
        ("inbox", "support,desk.*"),
        ("inbox-max", "500"),
        ("history", "1000"),
        ("history-bytes", "2MiB"),
        ("history-ttl", "5m"),
        ("publish-timeout", "250ms"),
        ("max-connections", "5"),
        ("max-connections-per-ip", "0"),
        ("max-connections-per-user", "5"),
        ("max-channels", "7"),
        ("max-subscriptions", "9"),
        ("presence", "room,team.*"),
        ("presence-list", "50"),
        ("max-message-size", "1KiB"),
        ("max-message-rate", "20"),
        ("max-byte-rate", "2MiB"),
        ("ping-interval", "1s"),
        ("ping-timeout", "2s"),
        ("ping-format", "both"),
        ("drain-timeout", "0s"),
        ("drain-delay", "15s"),
        ("shards", "3"),
        ("buffer-memory", "1MiB"),
        ("log", "warn,fanfare::bus=debug"),
        ("log-format", "json"),
    ];
    assert!(ROWS.iter().map(|row| row.flag.name).eq(others.iter().map(|(name, _)| *name)));
    let mut variables = Vec::new();
    let mut attached = Vec::new();
    let mut separate = Vec::new();
    for (name, value) in others {
        variables.push((variable(name), value.to_owned()));
        attached.push(format!("--{name}={value}"));
        separate.push(format!("--{name}"));
        if !matches!(name, "redis-durable" | "allow-anonymous") {
            separate.push(value.to_owned());
        }
    }
    let variables: Vec<_> = variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let attached: Vec<_> = attached.iter().map(String::as_str).collect();
    let separate: Vec<_> = separate.iter().map(String::as_str).collect();
    let settings = run(&[], &variables);
    assert_eq!(shown(&settings), others.map(|(name, value)| (name, value.to_owned())));
    assert_eq!(run(&attached, &[]), settings);
    assert_eq!(run(&separate, &[]), settings);

    // What --check prints is an environment file that gives the same settings.
    let check = [attached.as_slice(), &["--check"]].concat();
    let Ok(Action::Check(checked)) = read(&check, &[]) else { panic!("--check") };
    let text = checked.to_string();
    let printed: Vec<_> = text.lines().map(|line| line.split_once('=').unwrap()).collect();
    assert_eq!(run(&[], &printed), settings);
}

#[test]
fn renamed_settings_name_their_successor() {
    let renamed: Vec<_> = ROWS.iter().filter(|row| !row.flag.old_name.is_empty()).collect();
    assert_eq!(renamed.len(), 12);
    for row in renamed {
        let (old, new) = (row.flag.old_name, row.flag.name);
        assert_eq!(errors(&[&format!("--{old}=1")], &[]), [format!("--{old}: was renamed: use --{new}")]);
        let old = variable(old);
        assert_eq!(errors(&[], &[(&old, "1")]), [format!("{old}: was renamed: use {}", variable(new))]);
    }
}

#[test]
fn flags_win_over_variables() {
    let settings = run(&["--history", "2000"], &[("FANFARE_HISTORY", "3000"), ("FANFARE_REDIS", "")]);
    assert_eq!((settings.history, settings.redis), (2000, None));
    assert!(!run(&["--redis-durable=false"], &[("FANFARE_REDIS_DURABLE", "true")]).redis_durable);
}

#[test]
fn lists_are_separated_by_commas_or_repeated() {
    let settings =
        run(&["--listen", "127.0.0.1:1,127.0.0.1:2", "--listen=127.0.0.1:0", "--listen", "127.0.0.1:0"], &[]);
    assert_eq!(settings.listen.iter().map(SocketAddr::port).collect::<Vec<_>>(), [1, 2, 0, 0]);
    assert_eq!(run(&["--pubsub-channels", "none"], &[]).pubsub_channels, []);
}

#[test]
fn proxies_are_networks_or_addresses() {
    let given = "10.0.0.7,10.1.0.0/16,::1,fd00::/8,::ffff:10.2.0.0/112,::ffff:10.3.0.1,::/0,0.0.0.0/0";
    let shown: Vec<_> =
        run(&["--trusted-proxy", given], &[]).trusted_proxy.iter().map(IpNet::to_string).collect();
    let expected = [
        "10.0.0.7/32",
        "10.1.0.0/16",
        "::1/128",
        "fd00::/8",
        "10.2.0.0/16",
        "10.3.0.1/32",
        "::/0",
        "0.0.0.0/0",
    ];
    assert_eq!(shown, expected);
}

#[test]
fn caps_are_numbers_off_or_auto() {
    let caps = |text: &str| {
        let settings = run(&["--max-connections-per-ip", text, "--max-connections-per-user", text], &[]);
        assert_eq!(settings.max_connections_per_ip, settings.max_connections_per_user);
        settings.max_connections_per_user
    };
    assert_eq!((caps("auto"), caps("0")), (Cap::Auto, Cap::Off));
    assert_eq!(caps("1"), Cap::Most(NonZeroU32::MIN));
    assert_eq!(run(&["--max-connections", "7"], &[]).connection_limit(), 7);
    // Every shard needs descriptors of its own.
    let fit = |shards| run(&["--shards", shards], &[]).connection_limit();
    assert!(fit("1") > fit("2") || fit("1") == u32::MAX);
}

#[test]
fn help_and_version_win_over_errors() {
    assert_eq!(
        read(&["--nonsense", "--version"], &[]),
        Ok(Action::Version(format!("fanfare {}\n", env!("CARGO_PKG_VERSION"))))
    );
    let Ok(Action::Help(text)) = read(&["-h", "--version", "--listen", "x"], &[]) else { panic!("help") };
    for line in text.lines() {
        assert!(line.trim_end() == line, "{line:?}");
    }
    for row in ROWS {
        let flag = row.flag.with_dashes();
        let line = text.lines().find(|line| line.trim_start().starts_with(&format!("{flag} ")));
        let line = line.unwrap_or_else(|| panic!("{flag} is not in --help"));
        assert!(line.ends_with(&format!(" {}", row.variable())), "{line}");
        let (_, description) = text.split_once(line).unwrap();
        let description = description.split("\n  --").next().unwrap().split_whitespace();
        let default = format!("Default: {}.", if row.default.is_empty() { "none" } else { row.default });
        assert!(description.collect::<Vec<_>>().join(" ").contains(&default), "{flag}: no {default}");
    }
}

#[test]
fn docs_have_every_setting() {
    const START: &str = "<!-- settings:start -->\n";
    const END: &str = "<!-- settings:end -->\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (before, rest) = text.split_once(START).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let current = [before, START, &rows::markdown(), END, after].concat();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, &current).unwrap();
    }
    let command = "UPDATE_DOCS=1 cargo test --lib docs_have_every_setting";
    assert!(text == current, "docs/configuration.md is out of date. To write its table: {command}");
}

#[test]
fn wrong_settings_are_named_and_explained() {
    for (args, part) in [
        (
            &["--listen", "localhost:8080"] as &[_],
            "--listen: \"localhost:8080\" is not an IP address and port",
        ),
        (&["--listen", ":8080"], "not an IP address"),
        (&["--listen", "127.0.0.1:1,"], "\"\" is not an IP address"),
        (&["--listen", "127.0.0.1:1,127.0.0.1:1"], "127.0.0.1:1 is given twice"),
        (&["--listen", "127.0.0.1:9080"], "--admin: 127.0.0.1:9080 is also in --listen"),
        (&["--admin", "0.0.0.0:9080"], "--admin: 0.0.0.0:9080 is reachable from other hosts without a key"),
        (&["--admin", "[::]:9080"], "reachable from other hosts"),
        (&["--admin", "[::ffff:10.0.0.1]:9080"], "reachable from other hosts"),
        (&["--admin", "off", "--admin-key", "/k"], "--admin-key: has no effect with --admin off"),
        (
            &["--listen", "0.0.0.0:8080"],
            "--listen: 0.0.0.0:8080 is reachable from other hosts without authentication",
        ),
        (
            &["--listen", "127.0.0.1:8080,[2001:db8::1]:8080"],
            "[2001:db8::1]:8080 is reachable from other hosts",
        ),
        (&["--client-publish", "on"], "none of off, channel, any"),
        (&["--admin", "unix:"], "needs a path"),
        (&["--admin", "on"], "is none of"),
        (&["--allow-origin", "example.com"], "not an origin"),
        (&["--allow-origin", "https://a.example,null"], "--allow-origin: null needs --jwt-key"),
        (&["--trusted-proxy", "10.0.0.1/8"], "did you mean 10.0.0.0/8?"),
        (&["--trusted-proxy", "fd00::1/64"], "did you mean fd00::/64?"),
        (&["--trusted-proxy", "10.0.0.0/33"], "no address or network"),
        (&["--trusted-proxy", "nginx"], "no address or network"),
        (&["--trusted-proxy", "10.0.0.1:80"], "no address or network"),
        (&["--max-connections", "0"], "between 1 and"),
        (&["--max-connections", "many"], "nor auto"),
        (&["--max-connections-per-ip", "-1"], "neither a number of connections"),
        (&["--max-connections-per-user", "4294967296"], "neither a number of connections"),
        (&["--redis", "redis-cluster://a:1/2"], "without database"),
        (&["--redis", "redis-cluster://a:1", "--redis-durable"], "has no effect on a Redis Cluster"),
        (&["--redis", "redis-cluster://a:1", "--inbox", "a"], "does not work on a Redis Cluster yet"),
        (&["--redis", "redis-cluster://a:1", "--presence", "a"], "does not work on a Redis Cluster yet"),
        (&["--redis", ""], "--redis: is empty"),
        (&["--redis-prefix", "a b"], "without blanks"),
        (&["--redis-prefix", "a{b}"], "braces"),
        (&["--inbox", "desk"], "--inbox: needs --redis URL"),
        (&["--inbox", "*"], "neither a channel name"),
        (&["--inbox-max", "0"], "not a whole number between 1 and"),
        (&["--redis-durable"], "--redis-durable: has no effect without --redis"),
        (&["--redis-durable=yes"], "neither true nor false"),
        (&["--pubsub-channels", "a b"], "\"a b\" is not a channel name"),
        (&["--pubsub-channels", "fanfare:x"], "own Redis channels"),
        (&["--pubsub-channels", "a,b", "--max-channels", "1"], "fewer than --pubsub-channels"),
        (&["--history", "999"], "between 1000 and"),
        (&["--history-ttl", "24"], "such as 25s"),
        (&["--history-ttl", "0s"], "more than 0"),
        (&["--publish-timeout", "0ms"], "more than 0"),
        (&["--max-channels", "0"], "between 1 and"),
        (&["--max-message-size", "0"], "between 1 byte and 16MiB"),
        (&["--max-message-size", "17MiB"], "between 1 byte and 16MiB"),
        (
            &["--max-message-size", "16MiB", "--buffer-memory", "15MiB"],
            "--buffer-memory: must be at least --max-message-size (16MiB)",
        ),
        (&["--max-byte-rate", "fast"], "KB, MB or GB, nor auto"),
        (&["--max-byte-rate", "63KiB"], "at least 64KiB, or 0, with --max-message-size 64KiB"),
        (&["--max-byte-rate", "1MiB", "--max-message-size", "16MiB"], "at least 4MiB, or 0"),
        (&["--ping-interval", "0s"], "more than 0"),
        (&["--ping-timeout", "20"], "not a duration"),
        (&["--ping-format", "pong"], "none of websocket, json, both"),
        (&["--shards", "0"], "between 1 and 1024"),
        (&["--shards", "-1"], "between 1 and 1024, nor auto"),
        (&["--buffer-memory", "63KiB"], "must be at least --max-message-size (64KiB)"),
        (&["--log", "inof"], "did you mean info?"),
        (&["--log", "info,fanfare=loud"], "\"loud\" is not a level: one of off"),
        (&["--log", "info,"], "\"\" is not a level"),
        (&["--log", "a=b=info"], "not a log filter"),
        (&["--log-format", "xml"], "none of text, json"),
        (&["--history", "1000", "--history", "2000"], "--history: is given twice"),
        (&["--history"], "--history: needs a value: --history EVENTS"),
        (&["--listn", "x"], "--listn: there is no such flag; did you mean --listen?"),
        (&["--chek"], "did you mean --check?"),
        (&["--frobnicate=1"], "--frobnicate: there is no such flag"),
        (&["serve"], "serve: is not expected here"),
    ] {
        let errors = errors(args, &[]);
        assert!(errors.iter().any(|error| error.contains(part)), "{args:?}: {errors:#?}");
    }
}

#[test]
fn a_wrong_variable_is_named_as_a_variable() {
    assert_eq!(errors(&[], &[("FANFARE_SHARDS", "many")])[0].split(':').next(), Some("FANFARE_SHARDS"));
    assert!(
        errors(&[], &[("FANFARE_REDIS_DURABLE", "1")])[0].starts_with("FANFARE_REDIS_DURABLE: has no effect")
    );
    assert_eq!(
        errors(&[], &[("FANFARE_LISTN", "x")]),
        ["FANFARE_LISTN: there is no such setting; did you mean FANFARE_LISTEN?"]
    );
    assert_eq!(
        errors(&[], &[("FANFARE_JWT_KEY_FILE", "/k")]),
        ["FANFARE_JWT_KEY_FILE: there is no such setting; did you mean FANFARE_JWT_KEY?"]
    );
    for name in ["FANFARE_VERSION", "FANFARE_", "FANFARE_PORT", "FANFARE_PORT_80", "FANFARE_PORT_80_TCP_X"] {
        assert!(errors(&[], &[(name, "1")])[0].starts_with(&format!("{name}: there is no such setting")));
    }
    let kubernetes = [
        ("FANFARE_SERVICE_HOST", "10.0.0.1"),
        ("FANFARE_SERVICE_PORT", "80"),
        ("FANFARE_SERVICE_PORT_HTTP", "80"),
        ("FANFARE_PORT", "tcp://10.0.0.1:80"),
        ("FANFARE_PORT_80_TCP", "tcp://10.0.0.1:80"),
        ("FANFARE_PORT_80_TCP_PROTO", "tcp"),
        ("FANFARE_PORT_80_TCP_PORT", "80"),
        ("FANFARE_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("FANFARE_REDIS_PORT", "tcp://10.0.0.2:6379"),
        ("HOME", "/"),
    ];
    run(&[], &kubernetes);
}

#[test]
fn reports_every_error_but_no_password() {
    let args = ["--listen", "x", "--shards=0", "--nope", "--redis", "redis://:secret@a?x", "--listen", "y"];
    let found = read(&args, &[("FANFARE_HISTORY", "1")]).unwrap_err();
    let named: Vec<_> = found.iter().map(|error| error.setting.as_str()).collect();
    assert_eq!(named, ["--nope", "--listen", "--redis", "FANFARE_HISTORY", "--shards"]);
    let text = error_report(&found);
    assert!(text.starts_with("fanfare: 5 settings are wrong; nothing was started\n  --nope: "), "{text}");
    assert!(!text.contains("secret"));
}

#[test]
fn text_that_is_not_utf_8_is_an_error() {
    use std::os::unix::ffi::OsStringExt;
    let bad = || OsString::from_vec(vec![b'a', 0xff]);
    assert!(Settings::from([bad()], []).is_err());
    assert!(Settings::from(["--log".into(), bad()], []).is_err());
    assert!(Settings::from([], [("FANFARE_LOG".into(), bad())]).is_err());
    assert!(Settings::from([], [(bad(), bad())]).is_ok());
}

proptest! {
    #[test]
    fn no_argument_panics(args in prop::collection::vec(any::<String>(), 0..8), at in 0..ROWS.len(), value: String) {
        let mut args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
        let _ = Settings::from(args.clone(), []);
        args.extend([ROWS[at].flag.with_dashes().into(), value.into()]);
        let _ = Settings::from(args, []);
    }
}
