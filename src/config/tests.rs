use proptest::prelude::*;

use super::table::TABLE;
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

#[test]
fn nothing_given_means_the_defaults_that_help_shows() {
    let settings = run(&[], &[]);
    for (spec, (name, shown)) in TABLE.iter().zip(settings.shown()) {
        assert_eq!(spec.name, name);
        if !matches!(name, "shards" | "max-connections" | "buffer-memory" | "max-byte-rate") {
            assert_eq!(shown, spec.default, "--{name}");
        }
    }
    assert_eq!(settings.shards, std::thread::available_parallelism().unwrap());
    let files = settings.open_files.unwrap_or(u32::MAX);
    assert!((1..=files).contains(&settings.most_connections()));
    assert_eq!(settings.byte_rate(), 1 << 20);
    assert_eq!(run(&["--max-message-size", "2MiB"], &[]).byte_rate(), 2 << 20);
    assert_eq!(settings.log_targets().default_level(), Some(LevelFilter::INFO));
}

#[test]
fn every_setting_is_read_from_its_flag_in_both_forms_and_from_its_variable() {
    let others = [
        ("listen", "0.0.0.0:80,[::1]:81"),
        ("admin", "unix:/run/fanfare.sock"),
        ("allow-anonymous", "true"),
        ("jwt-key", "/etc/fanfare/new.pem,/etc/fanfare/old"),
        ("admin-key", "/etc/fanfare/admin.key"),
        ("client-publish", "channel"),
        ("allow-origin", "https://example.com,https://*.example.org:8443"),
        ("trusted-proxy", "10.0.0.7/32,fd00::/8"),
        ("redis", "redis://10.0.0.1:6379/2"),
        ("redis-prefix", "app:live"),
        ("redis-durable", "true"),
        ("pubsub-channels", "news,chat"),
        ("history", "1000"),
        ("history-bytes", "2MiB"),
        ("history-ttl", "5m"),
        ("publish-timeout", "250ms"),
        ("max-connections", "5"),
        ("max-connections-per-ip", "0"),
        ("max-connections-per-user", "5"),
        ("max-channels", "7"),
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
    assert_eq!(others.map(|(name, _)| name), run(&[], &[]).shown().map(|(name, _)| name));
    let mut variables = Vec::new();
    let mut attached = Vec::new();
    let mut separate = Vec::new();
    for (name, value) in others {
        variables.push((table::variable(name), value.to_owned()));
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
    assert_eq!(settings.shown().map(|(name, value)| (name, value)), others.map(|(n, v)| (n, v.to_owned())));
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
    for (old, new) in table::RENAMED {
        let Err(errors) = read(&[&format!("--{old}=1")], &[]) else { panic!("--{old} is taken") };
        assert_eq!(errors[0].problem, format!("was renamed: use --{new}"));
        let Err(errors) = read(&[], &[(&table::variable(old), "1")]) else { panic!("{old} is taken") };
        assert_eq!(errors[0].problem, format!("was renamed: use {}", table::variable(new)));
        assert!(TABLE.iter().any(|spec| spec.name == new), "--{new}");
    }
}

#[test]
fn a_flag_wins_over_its_variable_and_an_empty_variable_is_none() {
    let settings = run(&["--history", "2000"], &[("FANFARE_HISTORY", "3000"), ("FANFARE_REDIS", "")]);
    assert_eq!((settings.history, settings.redis), (2000, None));
    assert!(!run(&["--redis-durable=false"], &[("FANFARE_REDIS_DURABLE", "true")]).redis_durable);
}

#[test]
fn lists_come_by_comma_and_by_repeating_the_flag() {
    let settings =
        run(&["--listen", "127.0.0.1:1,127.0.0.1:2", "--listen=127.0.0.1:0", "--listen", "127.0.0.1:0"], &[]);
    assert_eq!(settings.listen.iter().map(SocketAddr::port).collect::<Vec<_>>(), [1, 2, 0, 0]);
    assert_eq!(run(&["--pubsub-channels", "none"], &[]).pubsub_channels, []);
}

#[test]
fn proxies_are_networks_or_single_addresses() {
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
fn caps_are_numbers_or_none_or_what_fits() {
    let caps = |text: &str| {
        let settings = run(&["--max-connections-per-ip", text, "--max-connections-per-user", text], &[]);
        assert_eq!(settings.max_connections_per_ip, settings.max_connections_per_user);
        settings.max_connections_per_user
    };
    assert_eq!((caps("auto"), caps("0")), (Cap::Auto, Cap::Off));
    assert_eq!(caps("1"), Cap::Most(NonZeroU32::MIN));
    assert_eq!(run(&["--max-connections", "7"], &[]).most_connections(), 7);
    // Every shard takes descriptors of its own.
    let fit = |shards| run(&["--shards", shards], &[]).most_connections();
    assert!(fit("1") > fit("2") || fit("1") == u32::MAX);
}

#[test]
fn help_and_version_win_over_everything_and_help_fits_the_page() {
    assert_eq!(
        read(&["--nonsense", "--version"], &[]),
        Ok(Action::Version(format!("fanfare {}\n", env!("CARGO_PKG_VERSION"))))
    );
    let Ok(Action::Help(text)) = read(&["-h", "--version", "--listen", "x"], &[]) else { panic!("help") };
    for line in text.lines() {
        assert!(line.len() <= 100 && line.trim_end() == line, "{} columns: {line:?}", line.len());
    }
    for spec in &TABLE {
        let line = text.lines().find(|line| line.trim_start().starts_with(&format!("{} ", spec.flag())));
        let line = line.unwrap_or_else(|| panic!("--{} is not in --help", spec.name));
        assert!(line.contains(&format!(" {} ", spec.variable())) && line.contains(spec.default), "{line}");
    }
}

#[test]
fn each_wrong_setting_is_named_and_explained() {
    for (args, part) in [
        (
            &["--listen", "localhost:8080"] as &[_],
            "--listen: \"localhost:8080\" is not an IP address and port",
        ),
        (&["--listen", ":8080"], "not an IP address"),
        (&["--listen", "127.0.0.1:1,"], "\"\" is not an IP address"),
        (&["--listen", "127.0.0.1:1,127.0.0.1:1"], "127.0.0.1:1 is given twice"),
        (&["--listen", "127.0.0.1:9080"], "--admin: 127.0.0.1:9080 is taken by --listen"),
        (&["--admin", "0.0.0.0:9080"], "--admin: 0.0.0.0:9080 is open to others"),
        (&["--admin", "[::]:9080"], "open to others"),
        (&["--admin", "[::ffff:10.0.0.1]:9080"], "open to others"),
        (&["--admin", "off", "--admin-key", "/k"], "--admin-key: is the key to nothing"),
        (&["--listen", "0.0.0.0:8080"], "--listen: 0.0.0.0:8080 is open to others and asks for no token"),
        (&["--listen", "127.0.0.1:8080,[2001:db8::1]:8080"], "[2001:db8::1]:8080 is open to others"),
        (&["--client-publish", "on"], "none of off, own, any"),
        (&["--admin", "unix:"], "needs a path"),
        (&["--admin", "on"], "is none of"),
        (&["--allow-origin", "example.com"], "not an origin"),
        (&["--allow-origin", "null"], "not an origin"),
        (&["--trusted-proxy", "10.0.0.1/8"], "did you mean 10.0.0.0/8?"),
        (&["--trusted-proxy", "fd00::1/64"], "did you mean fd00::/64?"),
        (&["--trusted-proxy", "10.0.0.0/33"], "no address or network"),
        (&["--trusted-proxy", "nginx"], "no address or network"),
        (&["--trusted-proxy", "10.0.0.1:80"], "no address or network"),
        (&["--max-connections", "0"], "between 1 and"),
        (&["--max-connections", "many"], "nor auto"),
        (&["--max-connections-per-ip", "-1"], "neither a number of connections"),
        (&["--max-connections-per-user", "4294967296"], "neither a number of connections"),
        (&["--redis", "redis-cluster://a:1"], "not supported yet"),
        (&["--redis", ""], "--redis: is empty"),
        (&["--redis-prefix", "a b"], "no blanks"),
        (&["--redis-prefix", "a{b}"], "braces"),
        (&["--redis-durable"], "--redis-durable: says something about a Redis"),
        (&["--redis-durable=yes"], "neither true nor false"),
        (&["--pubsub-channels", "a b"], "\"a b\" is not a channel name"),
        (&["--pubsub-channels", "fanfare:x"], "own Redis channels"),
        (&["--pubsub-channels", "a,b", "--max-channels", "1"], "fewer than --pubsub-channels"),
        (&["--history", "999"], "between 1000 and"),
        (&["--history-ttl", "24"], "such as 25s"),
        (&["--history-ttl", "0s"], "more than nothing"),
        (&["--publish-timeout", "0ms"], "more than nothing"),
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
        (&["--ping-interval", "0s"], "more than nothing"),
        (&["--ping-timeout", "20"], "not a duration"),
        (&["--ping-format", "pong"], "none of ping"),
        (&["--shards", "0"], "between 1 and 1024"),
        (&["--shards", "-1"], "between 1 and 1024, nor auto"),
        (&["--buffer-memory", "63KiB"], "must be at least --max-message-size (64KiB)"),
        (&["--log", "inof"], "did you mean info?"),
        (&["--log", "info,fanfare=loud"], "\"loud\" is not a level: one of off"),
        (&["--log", "info,"], "\"\" is not a level"),
        (&["--log", "a=b=info"], "not a log filter"),
        (&["--log-format", "xml"], "neither text nor json"),
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
    assert!(errors(&[], &[("FANFARE_REDIS_DURABLE", "1")])[0].starts_with("FANFARE_REDIS_DURABLE: says"));
    assert_eq!(
        errors(&[], &[("FANFARE_LISTN", "x")]),
        ["FANFARE_LISTN: there is no such setting; did you mean FANFARE_LISTEN?"]
    );
    assert_eq!(
        errors(&[], &[("FANFARE_JWT_KEY_FILE", "/k")]),
        ["FANFARE_JWT_KEY_FILE: there is no such setting; the nearest is FANFARE_JWT_KEY"]
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
fn every_error_is_reported_at_once_and_no_password_is() {
    let args = ["--listen", "x", "--shards=0", "--nope", "--redis", "redis://:secret@a?x", "--listen", "y"];
    let found = read(&args, &[("FANFARE_HISTORY", "1")]).unwrap_err();
    let named: Vec<_> = found.iter().map(|error| error.setting.as_str()).collect();
    assert_eq!(named, ["--nope", "--listen", "--redis", "FANFARE_HISTORY", "--shards"]);
    let text = report(&found);
    assert!(text.starts_with("fanfare: 5 settings are wrong; nothing was started\n  --nope: "), "{text}");
    assert!(!text.contains("secret"));
}

#[test]
fn what_is_not_utf_8_is_an_error_not_a_panic() {
    use std::os::unix::ffi::OsStringExt;
    let bad = || OsString::from_vec(vec![b'a', 0xff]);
    assert!(Settings::from([bad()], []).is_err());
    assert!(Settings::from(["--log".into(), bad()], []).is_err());
    assert!(Settings::from([], [("FANFARE_LOG".into(), bad())]).is_err());
    assert!(Settings::from([], [(bad(), bad())]).is_ok());
}

proptest! {
    #[test]
    fn no_argument_panics(args: Vec<String>, at in 0..TABLE.len(), value: String) {
        let mut args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
        let _ = Settings::from(args.clone(), []);
        args.extend([TABLE[at].flag().into(), value.into()]);
        let _ = Settings::from(args, []);
    }
}
